"""Sources to documents: text, JSONL and data sets, read only as far as asked, and what is refused."""

import gzip
import itertools
import json
import lzma
import re
import sys
from pathlib import Path

import pytest

from nr_serve.errors import DownloadFailed
from nr_serve.train.documents import PIECE_CHARACTERS
from nr_serve.train.entries import names_language, names_source, names_text
from nr_serve.train.recipe import BadRecipe
from nr_serve.train.recipe_file import parse_recipe
from nr_serve.train.text.dataset import Dataset
from nr_serve.train.text.sources import OPEN_SOURCES, find_sources, read_in_turn
from nr_serve.train.text.text_file import TextFile


def documents(path: Path, field: str = "text") -> list[str]:
    return list(TextFile(path, field).documents())


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(*texts: str, field: str = "text") -> str:
    return "".join(json.dumps({field: text, "n": 1}) + "\n" for text in texts)


def test_documents_are_separated_by_empty_lines_and_long_ones_cut_at_paragraphs(tmp_path: Path):
    long = "\n".join(["x" * 5000] * 3)
    read = documents(write(tmp_path / "hu.a.train.txt", f"egy\nkettő\n\nhárom\n\n\n{long}\n"))
    assert read[:2] == ["egy\nkettő", "három"]
    assert [len(d) for d in read[2:]] == [5000, 5000, 5000]
    assert all(len(d) <= PIECE_CHARACTERS for d in read)


def test_reading_line_by_line_gives_what_splitting_the_whole_text_gives(tmp_path: Path):
    for parts in itertools.product(["a", " ", "b\r", ""], repeat=5):
        path = write(tmp_path / "x.txt", "\n".join(parts))
        whole = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))  # a line of spaces is an empty line
        expected = ["\n".join(line for line in each.split("\n") if line.strip()) for each in whole]
        assert documents(path) == [each for each in expected if each], parts


@pytest.mark.parametrize(("suffix", "packer"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_jsonl_and_compressed_files_hold_the_same_documents(tmp_path: Path, suffix, packer):
    text = write(tmp_path / f"hu.a.txt{suffix}", packer("egy\nkettő\n\nhárom".encode()))
    lines = jsonl("egy\n\r\nkettő\r\n", "", "három") + "\n"
    rows = write(tmp_path / f"hu.a.jsonl{suffix}", packer(lines.encode()))
    assert documents(text) == documents(rows) == ["egy\nkettő", "három"]
    renamed = write(tmp_path / f"hu.b.jsonl{suffix}", packer(jsonl("igen", field="body").encode()))
    assert documents(renamed, "body") == ["igen"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_the_mark_that_some_editors_begin_with_is_no_text(tmp_path: Path, name):
    content = (jsonl("egy") if name == "a.jsonl" else "egy").encode("utf-8-sig")
    assert documents(write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)) == ["egy"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "jó\nrossz: ".encode() + b"\xe1rv\n", r"a\.txt is not UTF-8: line 2, byte 11 .*0xe1"),
        ("a.txt", b"x\n" * 9000 + b"\xff", r"line 9001, byte 18000 .*0xff"),
        ("a.txt.gz", gzip.compress(b"ok\n\xff", mtime=0), r"a\.txt\.gz is not UTF-8: line 2, byte 3 "),
        ("a.txt.gz", gzip.compress(b"x" * 9000, mtime=0)[:-12], r"cannot read .*a\.txt\.gz"),
        ("a.txt.xz", b"not compressed", r"cannot read .*a\.txt\.xz"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', r"a\.jsonl, line 3 has no field 'text'"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1 has no field 'text'"),
        ("a.jsonl", b'{"text": "a \\ud800 b"}\n', r"a\.jsonl, line 1: field 'text' holds half a surrogate pair"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl, line 1: field 'text' is not text but NoneType"),
    ],
)
def test_what_is_not_text_is_refused_with_its_place(tmp_path: Path, name, content, message):
    with pytest.raises(BadRecipe, match=message):
        documents(write(tmp_path / name, content))


def test_an_empty_source_is_refused_by_name(tmp_path: Path):
    write(tmp_path / "hu.a.txt", "szöveg")
    write(tmp_path / "hu.b.txt", "\n \n\n")
    with pytest.raises(BadRecipe, match=r"hu\.b\.txt holds no text"):
        read_in_turn(find_sources(tmp_path, ["hu.*"]))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("hu.*", r"matches 'hu\.\*'"),
        ("/etc/*", "not a glob"),
        ("", "not a glob"),
        *((folder, "not a glob of files in .*: it names a folder") for folder in (".", "./", "!.")),
    ],
)
def test_a_glob_without_text_is_refused(tmp_path: Path, pattern, message):
    with pytest.raises(BadRecipe, match=message):
        find_sources(tmp_path, [pattern])


class Endless:
    """A source that counts what is read of it."""

    def __init__(self, name: str, last: int | None = None) -> None:
        self.name, self.last, self.read = name, last, 0

    def documents(self, end=""):
        while self.last is None or self.read < self.last:
            self.read += 1
            yield f"{self.name}{self.read:09}"


def test_a_bound_is_filled_from_all_sources_in_turn_and_no_more_is_read():
    a, b, c = sources = [Endless("a"), Endless("b", last=2), Endless("c")]
    read = read_in_turn(sources, characters=100)
    four = ["000000001", "000000002", "000000003", "000000004"]
    assert read == [*(f"a{n}" for n in four), *(f"b{n}" for n in four[:2]), *(f"c{n}" for n in four)]
    assert (a.read, b.read, c.read) == (4, 2, 4)


def test_few_sources_are_open_at_once_and_all_are_read_in_the_end():
    sources = [Endless(f"{i:03}", last=1 + i % 3) for i in range(3 * OPEN_SOURCES)]
    first = read_in_turn(sources, characters=1)
    assert [int(document[:3]) for document in first] == list(range(0, 3 * OPEN_SOURCES, 3))  # spread over all
    sources = [Endless(f"{i:03}", last=1 + i % 3) for i in range(3 * OPEN_SOURCES)]
    assert read_in_turn(sources) == [f"{s.name}{n:09}" for s in sources for n in range(1, s.last + 1)]


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A folder that the library reads: two splits, two files in the first."""
    folder = tmp_path / "hub" / "web"
    folder.mkdir(parents=True)
    write(folder / "train-0.jsonl", jsonl(*(f"egy {i}\nkettő" for i in range(3))))
    write(folder / "train-1.jsonl", jsonl("utolsó"))
    write(folder / "test-0.jsonl", jsonl("próba"))
    return folder


def test_a_data_set_is_streamed_from_a_folder_by_split(tmp_path: Path, data_set, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (train,) = find_sources(tmp_path / "hub", ["datasets:web"])
    (test,) = find_sources(tmp_path, [f"datasets:{data_set}@test"])
    assert read_in_turn([train]) == ["egy 0\nkettő", "egy 1\nkettő", "egy 2\nkettő", "utolsó"]
    assert read_in_turn([test]) == ["próba"]
    assert (train.name, train.language, str(train)) == ("web", "web", "datasets:web@train")
    assert train.identity != test.identity
    assert train.identity == find_sources(tmp_path, [f"datasets:{data_set}@train"])[0].identity


def test_only_the_start_of_a_data_set_is_read(tmp_path: Path, data_set):
    write(data_set / "train-1.jsonl", "not JSON\n")
    stream = Dataset.parse("datasets:hub/web", tmp_path, "text").documents()
    assert [next(stream) for _ in range(3)] == ["egy 0\nkettő", "egy 1\nkettő", "egy 2\nkettő"]
    with pytest.raises(BadRecipe, match="cannot read datasets:hub/web@train"):
        next(stream)


def test_a_changed_data_set_has_another_fingerprint(tmp_path: Path, data_set):
    def fingerprint(written: str = "datasets:hub/web", field: str = "text") -> str:
        return Dataset.parse(written, tmp_path, field).fingerprint()

    before = fingerprint()
    assert before == fingerprint()
    assert len({before, fingerprint("datasets:hub/web@test"), fingerprint(field="body")}) == 3
    write(data_set / "train-2.jsonl", jsonl("több"))
    assert before != fingerprint()


@pytest.mark.parametrize(
    ("written", "field", "message"),
    [
        ("datasets:hub/web", "body", r"datasets:hub/web@train, row 0 has no field 'body'"),
        ("datasets:hub/web", "n", r"row 0: field 'n' is not text but int"),
        ("datasets:hub/web@none", "text", "cannot read datasets:hub/web@none"),
        ("datasets:hub/web:nosuch", "text", "cannot read datasets:hub/web:nosuch@train"),
        ("datasets:", "text", r"is not datasets:NAME\[:CONFIG\]\[@SPLIT\]"),
        ("datasets:a@train[:5]", "text", r"is not datasets:NAME\[:CONFIG\]\[@SPLIT\]"),
    ],
)
def test_what_a_data_set_does_not_hold_is_refused_by_name(tmp_path: Path, data_set, written, field, message):
    with pytest.raises(BadRecipe, match=message):
        read_in_turn([Dataset.parse(written, tmp_path, field)])


def test_a_hub_out_of_reach_is_a_failed_download(tmp_path: Path, monkeypatch):
    import datasets

    def unreachable(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(DownloadFailed, match="cannot reach datasets:some/where@train: no route"):
        Dataset.parse("datasets:some/where", tmp_path, "text").fingerprint()


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadRecipe, match=r"needs the library datasets, of the extra `train`"):
        Dataset.parse("datasets:some/where", tmp_path, "text").fingerprint()


def test_a_target_that_may_have_no_end_needs_a_bound():
    values = {
        "domain": "hu",
        "data": {"target": ["datasets:a/b"], "original": ["en.*"]},
        "blocks": {"h": 16},
        "run": {"tokens": 4096},
    }
    with pytest.raises(BadRecipe, match="target_tokens is needed"):
        parse_recipe(values)
    values["data"]["target_tokens"] = 1000
    assert parse_recipe(values).data.target_tokens == 1000


def test_a_glob_after_an_exclamation_mark_leaves_out_what_was_named_before(tmp_path: Path):
    for name in ("cs.a.train.txt", "cs.b.train.txt", "hu.a.train.txt", "hu.a.heldout.txt", "sk.a.train.txt"):
        write(tmp_path / name, "text\n")

    def found(*entries: str) -> list[str]:
        return [Path(str(source.identity)).name for source in find_sources(tmp_path, entries)]

    assert found("*.train.txt", "!cs.*", "!sk.*") == ["hu.a.train.txt"]
    assert found("*.train.txt", "!cs.*", "!xx.*", "cs.b.train.txt") == [
        "cs.b.train.txt",
        "hu.a.train.txt",
        "sk.a.train.txt",
    ]
    with pytest.raises(BadRecipe, match=r"is left after '!\*\.train\.txt'"):
        find_sources(tmp_path, ["hu.*.train.txt", "!*.train.txt"])
    with pytest.raises(BadRecipe, match="is left after '!hu"):
        find_sources(tmp_path, ["!hu.*"])


def test_a_file_or_a_data_set_is_named_apart_from_held_out_text_of_its_source():
    entries = ("*.*.train.txt", "!cs.*", "below/no.a.txt", "datasets:org/web:no", "datasets:org/all@test")
    named = ("hu.a.train.txt", "no.a.txt", "datasets:org/web:no@train", "datasets:org/all@test")
    other = ("hu.a.heldout.txt", "cs.a.train.txt", "datasets:org/web:no@test", "datasets:org/all@train")
    assert [names_text(entries, text) for text in (*named, *other)] == [True] * 4 + [False] * 4
    assert not names_text(["*"], "datasets:org/web@train")


def test_what_is_left_out_is_not_named():
    entries = ("*.*.train.txt", "!cs.*.train.txt", "!hu.a.train.txt")
    assert names_source(entries, "hu.b")
    assert not names_source(entries, "hu.a")
    assert names_source((*entries, "hu.a.train.txt"), "hu.a")
    assert names_language(entries, "hu")
    assert not names_language(entries, "cs")
    assert names_language((*entries, "cs.a.train.txt"), "cs")
    assert names_source(["hu*.train.txt"], "hu.a")
    assert not names_source(["hu*.train.txt"], "cs.a")
    for others in ("!hu.*.heldout.txt", "!hu.*.heldout*", "!hu.a.dirty.txt"):
        assert names_source(["hu.*", others], "hu.a")
    for own in (
        "!hu.a.*",
        "!hu.a*",
        "!hu.*.train.txt",
        "!hu.a.jsonl",
        "!hu.a.jsonl.gz",
        "!hu.a.jsonl*",
        "!hu.a.*txt",
    ):
        assert not names_source(["hu.*", own], "hu.a")
    assert not names_language(["*.train.txt", "!cs*"], "cs")
    assert names_language(["hu.*", "!hu.*.heldout.txt"], "hu")
