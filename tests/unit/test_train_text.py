"""A recipe's text: which windows it gives, in which order, and what is refused."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from nr_serve.train.recipe import BadRecipe, Data, Run
from nr_serve.train.text.classes import Classes
from nr_serve.train.text.frames import Frames, find_frames
from nr_serve.train.text.mix import Mix
from nr_serve.train.text.overlap import grams
from nr_serve.train.text.pack import BATCH_DOCUMENTS, Windows, join, pack
from nr_serve.train.text.read import chat_documents, read_classes, read_heldout
from nr_serve.train.text.sources import find_sources
from tests import tiny

RUN = Run(tokens=4096, window=32, batch_tokens=128, original_share=0.125, background_share=0.125, seed=3)
DATA = Data(target=("hu.*",), original=("en.*",), background=("da.*",), heldout=("xx.*",))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("NR_CACHE", str(tmp_path / "cache"))


def words(language: str, seed: int, count: int) -> list[str]:
    """Random words of a language's own 200, by a generator that is the same everywhere."""
    draw = random.Random(f"{language}{seed}")
    return [f"{language}{draw.randrange(200)}" for _ in range(count)]


def text(language: str, seed: int, documents: int, count: int = 40) -> str:
    parts = []
    for i in range(documents):
        drawn = words(language, 1000 * seed + i, count)
        parts.append(" ".join(drawn[: count // 2]) + "\n" + " ".join(drawn[count // 2 :]))
    return "\n\n".join(parts) + "\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    long = "\n".join(" ".join(words("hu", 77 + i, 500)) for i in range(9))
    files = {
        "hu.a.train.txt": text("hu", 1, 30) + "\n\n \n" + long + "\n",
        "hu.b.train.txt": text("hu", 2, 20).replace("\n", "\r\n") + "őű\x0bíé\u2028ó",
        "en.a.train.txt": "\n" + text("en", 3, 130, 30),
        "en.b.train.txt": text("en", 4, 12),
        "da.a.train.txt": text("da", 5, 12),
        "da.b.train.txt": text("da", 6, 12),
        "xx.a.heldout.txt": text("xx", 7, 40),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content.encode())
    return folder


def add(corpus: Path, name: str, content: str) -> None:
    (corpus / name).write_text(content, encoding="utf-8")


def row(language: str, count: int) -> str:
    return json.dumps({"text": " ".join(words(language, 9, count))}) + "\n"


def sha(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:16]


def test_the_windows_and_their_order_are_those_of_every_earlier_run(corpus):
    hf = tiny.tokenizer().hf
    classes = read_classes(corpus, DATA, hf, RUN)
    parts = [classes.target, *classes.original.values(), *classes.background.values()]
    order = Mix(classes, RUN)
    batches = [w.ids_NT for step in range(200) for w in order.batch(step) if w is not None]
    held = read_heldout(corpus, ["xx.*"], hf, 32, 5)["xx.a"]
    assert list(classes.original) == ["en.a", "en.b", "chat"]
    assert list(classes.background) == ["da"]
    assert classes.digest() == "c32a32c3170c692b"
    assert sha(*(w.ids_NT for w in parts)) == "bc297a502ff49f17"
    assert sha(*(w.offset_NT for w in parts)) == "1b3f752556c9a432"
    assert sha(*batches) == "e1be20811aa52f75"
    assert sha(held.ids_NT, held.offset_NT) == "50d7ab9abe5341d3"


def test_the_text_does_not_depend_on_the_budget(corpus):
    hf = tiny.tokenizer().hf
    larger = RUN.model_copy(update={"tokens": 100 * RUN.tokens})
    assert read_classes(corpus, DATA, hf, RUN).digest() == read_classes(corpus, DATA, hf, larger).digest()


def test_the_target_is_read_as_far_as_the_recipe_says(corpus, monkeypatch):
    monkeypatch.setattr("nr_serve.train.text.read.POOL_CHARACTERS", 100)
    add(corpus, "hu.c.train.jsonl", 300 * row("hu", 30) + "not JSON\n")
    bounded = DATA.model_copy(update={"target_tokens": 3200})
    classes = read_classes(corpus, bounded, tiny.tokenizer().hf, RUN)
    assert len(classes.target) == 100
    with pytest.raises(BadRecipe, match="line 301 is not JSON"):
        read_classes(corpus, DATA, tiny.tokenizer().hf, RUN)


def test_no_more_documents_are_read_than_fill_the_windows_and_only_those_count_as_read():
    documents = [" ".join(words("hu", i, 40)) for i in range(4 * BATCH_DOCUMENTS)]
    hf, read = tiny.tokenizer().hf, []

    class Recording:
        def __call__(self, batch, **how):
            read.extend(batch if isinstance(batch, list) else [])
            return hf(batch, **how)

    packed = pack(Recording(), documents, window=32, limit=320, seed=1)
    assert len(packed.windows) == 10
    assert set(read) < set(documents)
    assert torch.equal(packed.grams, grams(read))


def test_a_source_in_several_files_is_one_class(corpus):
    hf = tiny.tokenizer().hf
    one = read_classes(corpus, DATA, hf, RUN).original["en.b"]
    add(corpus, "en.b.more.jsonl", row("en", 400))
    both = read_classes(corpus, DATA, hf, RUN)
    assert list(both.original) == ["en.a", "en.b", "chat"]
    assert len(both.original["en.b"]) > len(one)


def test_chat_documents_use_the_template(corpus):
    hf = tiny.tokenizer().hf
    assert chat_documents(hf, ["kérdés\nválasz"]) == ["<user>kérdés\n<assistant>válasz\n<assistant>"]
    hf.chat_template = None
    assert list(read_classes(corpus, DATA, hf, RUN).original) == ["en.a", "en.b"]


def test_classes_have_the_tokenizers_frames_but_no_chat_if_the_recipe_leaves_it_out(corpus, capsys):
    hf = tiny.tokenizer().hf
    with_chat = read_classes(corpus, DATA, hf, RUN.model_copy(update={"window": 64, "batch_tokens": 64}))
    assert with_chat.frames == find_frames(hf, chat=True) != Frames([])
    assert capsys.readouterr().err == ""
    without = read_classes(corpus, DATA.model_copy(update={"chat": False}), hf, RUN)
    assert without.frames == Frames([])
    assert list(without.original) == ["en.a", "en.b"]
    assert read_classes(corpus, DATA, hf, RUN).frames == with_chat.frames
    assert "takes more than half of 32 tokens: only original text is put in it" in capsys.readouterr().err


def test_what_begins_a_text_stands_once_before_each(corpus):
    fast = tiny.tokenizer().hf
    begins = TemplateProcessing(single="<298> $A", special_tokens=[("<298>", 298)])
    fast.backend_tokenizer.post_processor = begins
    fast.add_special_tokens({"bos_token": "<298>"})
    fast.chat_template = "<298>" + fast.chat_template
    classes = read_classes(corpus, DATA, fast, RUN)
    assert list(classes.frames.beginning) == [298]
    for windows in (classes.original["en.a"], classes.original["chat"]):
        is_bos_NT = windows.ids_NT == 298
        assert is_bos_NT.any()
        assert not (is_bos_NT[:, 1:] & is_bos_NT[:, :-1]).any()
        begins_NT = windows.offset_NT == 0
        assert torch.equal(is_bos_NT, begins_NT), "what is cut by a window's end begins anew"
        assert begins_NT[:, 0].all()
        assert (begins_NT.sum(dim=1) < 3).any(), "some document is longer than what is left of its window"


def test_documents_end_as_the_recipe_says(corpus):
    hf = tiny.tokenizer().hf
    ending = DATA.model_copy(update={"end_of_text": True})
    plain, ended = (read_classes(corpus, data, hf, RUN) for data in (DATA, ending))
    assert not any((windows.ids_NT == 299).any() for windows in (plain.target, plain.original["en.b"]))
    documents = (corpus / "en.b.train.txt").read_text().strip().split("\n\n")
    ids = ended.original["en.b"].ids_NT.flatten().tolist()
    assert ids.count(299) >= len(documents) - 1  # the last may be cut off
    ends = [hf.decode(ids[max(0, at - 3) : at]) for at, token in enumerate(ids) if token == 299]
    assert all(any(document.endswith(end) for document in documents) for end in ends)
    offsets = ended.original["en.b"].offset_NT.flatten().tolist()
    after = [offsets[at + 1] for at, token in enumerate(ids[:-1]) if token == 299]
    assert set(after) == {0}, "what follows is another document"
    assert torch.equal(read_heldout(corpus, ["xx.*"], hf, 32, 5)["xx.a"].ids_NT == 299, torch.zeros(5, 32).bool())
    hf.eos_token = None
    with pytest.raises(BadRecipe, match="has no end-of-text token"):
        read_classes(corpus, ending, hf, RUN)


def test_a_long_document_ends_once(corpus):
    long = "\n".join(" ".join(words("hu", i, 500)) for i in range(9))
    add(corpus, "fi.a.train.txt", long + "\n")
    pieces = list(find_sources(corpus, ["fi.*"])[0].documents("<299>"))
    assert len(pieces) > 1
    assert [piece.endswith("<299>") for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "\n".join(pieces) == long + "<299>"


def test_too_little_text_is_refused(tmp_path: Path):
    for name in ("hu.a.txt", "en.a.txt"):
        (tmp_path / name).write_text("rövid\n")
    run = Run(tokens=512, window=128, batch_tokens=512)
    with pytest.raises(BadRecipe, match="fills 0 windows of 128 tokens"):
        read_classes(tmp_path, Data(target=("hu.*",), original=("en.*",)), tiny.tokenizer().hf, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"original": ("en.*", "hu.a.*")}, r"hu\.a\.train\.txt is in both data\.target and data\.original"),
        ({"heldout": ("da.a.*",)}, r"da\.a\.train\.txt is in both data\.background and data\.heldout"),
        ({"original": ("en.*", "xx.*"), "heldout": ()}, r"data\.original names held-out text, xx\.a\.heldout\.txt"),
        ({"target": ("hu.*", "hu.b.*")}, r"hu\.b\.train\.txt is listed twice"),
        ({"original": ("en.*", "link.*")}, r"link\.txt is in both data\.target and data\.original"),
        ({"background": ("da.*", "chat*")}, "two classes of text are named 'chat'"),
        ({"background": ("sk.*", "da.*", "cs.*")}, r"no text in .* matches 'sk\.\*', 'cs\.\*': "),
        ({"original": ("qq.*",), "heldout": ("yy.*",)}, r"no text in .* matches 'qq\.\*', 'yy\.\*': "),
    ],
)
def test_a_source_with_two_parts_to_play_is_refused(corpus, change, message):
    (corpus / "link.txt").symlink_to(corpus / "hu.b.train.txt")
    add(corpus, "chat", text("sk", 1, 20))
    with pytest.raises(BadRecipe, match=message):
        read_classes(corpus, DATA.model_copy(update=change), tiny.tokenizer().hf, RUN)


def test_a_target_that_is_another_classs_text_too_is_refused_and_both_are_named(corpus):
    english = (corpus / "en.a.train.txt").read_text().split("\n\n")
    kept = "\n\n".join(english[:50])
    add(corpus, "hu.copy.train.txt", kept.replace("\n", " \n\n"))
    with pytest.raises(BadRecipe, match=r"the target and the text of original en\.a share 2\d% of"):
        read_classes(corpus, DATA, tiny.tokenizer().hf, RUN)
    add(corpus, "hu.copy.train.txt", "\n\n".join(english[:5]))
    assert len(read_classes(corpus, DATA, tiny.tokenizer().hf, RUN).target)


def test_held_out_text_that_is_trained_on_is_refused_and_both_are_named(corpus):
    hf = tiny.tokenizer().hf
    classes = read_classes(corpus, DATA, hf, RUN)
    add(corpus, "hu.leak.heldout.txt", (corpus / "hu.a.train.txt").read_text())
    with pytest.raises(BadRecipe, match=r"held-out text of hu\.leak and the target share 100% of"):
        read_heldout(corpus, ["*.heldout.txt"], hf, 32, 400, apart_from=classes)
    assert set(read_heldout(corpus, ["xx.*"], hf, 32, 400, apart_from=classes)) == {"xx.a"}


def test_held_out_text_that_fills_no_window_is_refused(corpus):
    with pytest.raises(BadRecipe, match=r"the text of xx\.a fills 0 windows of 100000 tokens; 1 must be filled"):
        read_heldout(corpus, ["xx.*"], tiny.tokenizer().hf, 100_000, 5)


def test_text_of_documents_of_one_token_is_refused(corpus):
    add(corpus, "yy.a.train.txt", "\n\n".join("abcdefgh"[i % 8] for i in range(600)))
    for role in ("target", "background"):
        with pytest.raises(BadRecipe, match="documents of one token each"):
            read_classes(corpus, DATA.model_copy(update={role: ("yy.a.train.txt",)}), tiny.tokenizer().hf, RUN)


def numbered(start: int, count: int) -> Windows:
    ids = torch.arange(start, start + count)[:, None].expand(count, 8)
    return Windows(ids, torch.arange(8).expand(count, 8))


def test_the_digest_tells_documents_names_and_parts_apart():
    target, one, two = numbered(0, 20), numbered(100, 3), numbered(200, 5)
    cut = Windows(one.ids_NT, one.offset_NT % 4)
    texts = [
        Classes(target, {"a": one, "b": two}, {}),
        Classes(target, {"a": cut, "b": two}, {}),
        Classes(target, {"a": one, "c": two}, {}),
        Classes(target, {"a": join([one, two])}, {}),
        Classes(target, {"a": one}, {"b": two}),
        Classes(join([target, one]), {"b": two}, {}),
    ]
    digests = [text.digest() for text in texts]
    digests += [texts[0].digest({"h": one}), texts[0].digest({"h": two}), texts[0].digest({"g": one})]
    assert len(set(digests)) == len(digests)
    assert texts[0].digest() == Classes(target, {"a": one, "b": numbered(200, 5)}, {}).digest()


def mix(**run) -> Mix:
    classes = Classes(
        target=numbered(0, 20),
        original={"a": numbered(100, 3), "b": numbered(200, 5)},
        background={"da": numbered(300, 2)},
    )
    return Mix(classes, Run(**({"tokens": 8000, "window": 8, "batch_tokens": 32} | run)))


def test_shares_hold_over_a_run_and_every_target_window_is_read_before_any_twice():
    read = {"target": [], "original": [], "background": []}
    order = mix(original_share=0.1, background_share=0.15)
    for step in range(100):
        parts = order.batch(step)
        assert sum(len(p) for p in parts if p is not None) == 4
        assert len(parts[0]) >= order.run.fewest_targets >= 1
        for part, windows in zip(read, parts, strict=True):
            read[part] += windows.ids_NT[:, 0].tolist() if windows is not None else []
    assert {part: len(ids) for part, ids in read.items()} == {"target": 300, "original": 40, "background": 60}
    assert sorted(read["target"][:20]) == list(range(20))
    assert read["target"][:20] != read["target"][20:40]
    assert [i // 100 for i in read["original"][:4]] == [1, 2, 1, 2]


def test_a_share_that_no_float_holds_is_met_to_the_window():
    order = mix(batch_tokens=64, original_share=0.29, background_share=0.29)
    steps = [order.batch(step) for step in range(100)]
    assert [sum(len(step[part] or ()) for step in steps) for part in range(3)] == [336, 232, 232]


def test_a_batch_depends_on_the_step_alone():
    straight, jumped = mix(), mix()
    for step in range(50):
        straight.batch(step)
    for ours, theirs in zip(straight.batch(50), jumped.batch(50), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours.ids_NT, theirs.ids_NT)
    assert torch.equal(straight.batch(0)[0].ids_NT, mix().batch(0)[0].ids_NT), "whatever was read before"


def test_a_share_of_background_text_that_is_not_there_is_refused():
    classes = Classes(numbered(0, 20), {"a": numbered(100, 3)}, {})
    run = Run(tokens=8000, window=8, batch_tokens=32, background_share=0.1)
    with pytest.raises(BadRecipe, match=r"background_share is 0\.1, but data\.background names no text"):
        Mix(classes, run)
    assert Mix(classes, run.model_copy(update={"background_share": 0.0})).batch(0)[2] is None
