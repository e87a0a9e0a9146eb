"""The probe texts: the built-in ones, and files that replace them."""

from pathlib import Path

import pytest

from nr_serve.config import PROBE_TOKENS
from nr_serve.engine.adapters.probe_text import BUILT_IN, probe_requests, read_probe_texts
from nr_serve.errors import BadRequest
from tests import tiny


def test_the_probe_texts_are_plain_english_of_several_kinds():
    texts = read_probe_texts([], tiny.tokenizer())
    assert set(texts) == {"prose", "questions", "documentation", "code", "chat"}
    for path in BUILT_IN:
        assert 200 < len(path.read_text(encoding="ascii")) < 2000
    assert tiny.tokenizer().decode(texts["chat"]).startswith("<user>Hi!"), "the base's own template"
    bare = tiny.tokenizer()
    bare.hf.chat_template = None
    assert bare.decode(read_probe_texts([], bare)["chat"]).startswith("Hi!")


def test_files_replace_the_texts_and_long_ones_are_cut(tmp_path):
    (tmp_path / "law.txt").write_text("The court. " * 20_000)
    (tmp_path / "chat.txt").write_text("Hello.")
    texts = read_probe_texts([tmp_path / "law.txt", tmp_path / "chat.txt"], tiny.tokenizer())
    assert tiny.tokenizer().decode(texts["chat"]) == "Hello.", "a file is taken as it is"
    made = probe_requests(texts, longest=10_000, row=0, pages=range(4))
    assert {name: request.prompt_length for name, request in made.items()} == {"law": PROBE_TOKENS, "chat": 6}
    made = probe_requests(texts, longest=5, row=0, pages=range(4))
    assert {request.prompt_length for request in made.values()} == {5}


@pytest.mark.parametrize("case", ["missing", "empty", "no text", "two of a name"])
def test_a_wrong_probe_text_is_said(tmp_path, case):
    path = tmp_path / "law.txt"
    if case != "missing":
        path.write_bytes({"empty": b" \n", "no text": b"\xff\xfe"}.get(case, b"The court."))
    files = [path, Path(path)] if case == "two of a name" else [path]
    with pytest.raises(BadRequest, match="law"):
        read_probe_texts(files, tiny.tokenizer())
