"""A corpus is fetched as its recipe says, from packages and from the user's own folder."""

import io
import json
import signal
import subprocess
import sys

import pytest

from nr_serve.disk import CannotWrite, held
from nr_serve.errors import BadRequest, Conflict, DownloadFailed
from nr_serve.train.corpus import build
from nr_serve.train.corpus import packages as corpus_packages
from nr_serve.train.corpus.recipe import read_recipe

# Recipes


def recipe(tmp_path, text):
    path = tmp_path / "corpora.toml"
    path.write_text(text)
    return path


TABLE = """
[[source]]
name = "x"
languages = ["hu", "da"]
locales = { hu = "hu_HU" }
kind = "deb"
packages = ["p-{lang}"]
files = ["{locale}/*.txt"]
format = "text"
licence = "MIT"
"""


def test_a_table_gives_a_source_for_each_language(tmp_path):
    hu, da = read_recipe(recipe(tmp_path, TABLE))
    assert (hu.name, hu.packages, hu.files) == ("hu.x", ("p-hu",), ("hu_HU/*.txt",))
    assert (da.name, da.files) == ("da.x", ("da/*.txt",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("kind =", "knid ="), "knid: not a known key"),
        (('"deb"', '"rpm"'), "kind: Input should be 'deb'.* or 'folder'"),
        (('["{locale}/*.txt"]', '"*.txt"'), "files: Input should be a valid tuple"),
        (('["hu", "da"]', '"hu"'), "list of languages"),
        (("[[source]]", "[source]"), "two brackets"),
        (('licence = "MIT"', ""), "needs its licence"),
        (('format = "text"', ""), "needs its format"),
        (('packages = ["p-{lang}"]', ""), "'deb' needs packages"),
        (('"deb"', '"folder"'), "'folder' takes no packages"),
        (('kind = "deb"', 'kind = "deb"\nfolder = "x"'), "'deb' takes no folder"),
        (('name = "x"', ""), "lacks its name"),
        (('["hu", "da"]', '["hu", "hu"]'), "hu.x named twice"),
        (("[[source]]", "[[source"), "corpora.toml"),
        (("licence", "format2"), "format2: not a known key"),
        (('kind = "deb"', 'kind = "deb"\nlanguage = "de"'), "language: not a known key"),
        ((TABLE, "source = [1]"), "not 1"),
        (('name = "x"', 'name = "../x"'), "'../x' is no name"),
        (('["hu", "da"]', '["../hu"]'), "'../hu' is no name"),
        (('["hu", "da"]', "[1]"), "1 is no name"),
        (('{ hu = "hu_HU" }', "{ hu = 1 }"), "locales is no table"),
        (('kind = "deb"', 'kind = "deb"\nstrip = "("'), "strip is no regular expression"),
        (('kind = "deb"', 'kind = "deb"\nmatch = "["'), "match is no regular expression"),
        (('kind = "deb"', 'kind = "deb"\nmatch = "x"'), "match has no group"),
        (('kind = "deb"', 'kind = "deb"\nfield = "x"'), "'text' takes no field"),
        (('format = "text"', 'format = "html"\nmatch = "(x)"'), "'html' takes no match"),
        (('format = "text"', 'format = "jsonl"\nfield = "x"\ndocument = ["1"]'), "'jsonl' takes no document"),
        (('format = "text"', 'format = "jsonl"'), "'jsonl' needs field"),
        (('format = "text"', 'format = "csv"\nfield = "text"'), "a column of csv is a number"),
        (('format = "text"', 'format = "csv"\nfield = "1"\ndocument = ["-1"]'), "a column of csv is a number"),
        (('kind = "deb"', 'kind = "deb"\nlimit_mb = nan'), "limit_mb: Input should be"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_fault(tmp_path, change, message):
    with pytest.raises(BadRequest, match=message):
        read_recipe(recipe(tmp_path, TABLE.replace(*change)))


# From packages


class FakePackages:
    """Packages that lie in a folder already; "p-da" cannot be had."""

    root = None

    def __init__(self, work, languages=()):
        self.versions = {}

    def deb(self, name):
        if name == "p-da":
            raise DownloadFailed("no such package")
        self.versions[name] = "1.0"
        return self.root


def words_of(*numbers):
    """60 words that no other numbers give."""
    stem = "szó" + "".join(chr(97 + n) for n in numbers)
    return " ".join(f"{stem}{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(60))


@pytest.fixture
def registry(tmp_path, monkeypatch):
    root = tmp_path / "package"
    (root / "hu_HU").mkdir(parents=True)
    for i in range(60):
        (root / "hu_HU" / f"{i:02}.txt").write_text(words_of(i % 26, i // 26))
    monkeypatch.setattr(FakePackages, "root", root)
    monkeypatch.setattr(build, "Packages", FakePackages)
    return root


@pytest.fixture
def fetch(registry, tmp_path):
    """Fetches what a table of sources gives for Hungarian, into a folder."""

    def fetch(table=TABLE, out="out", only="hu.*"):
        return build.fetch_corpus(recipe(tmp_path, table), tmp_path / out, [only])

    return fetch


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


def test_a_corpus_is_written_with_its_manifest_and_found_again(fetch, tmp_path):
    out = tmp_path / "out"
    [fetched] = fetch()
    text = fetched.train.read_text()
    assert fetched.train.name == "hu.x.train.txt"
    assert sum(len(line) for line in text.splitlines()) == fetched.train_chars
    assert text.count("\n\n") + 1 + fetched.heldout.read_text().count("\n\n") + 1 == 60
    entry = manifest(out)["hu.x"]
    assert (entry["licence"], entry["versions"]) == ("MIT", {"p-hu": "1.0"})

    before = fetched.train.stat().st_mtime_ns
    assert fetch(only="hu.x") == [fetched]
    assert fetched.train.stat().st_mtime_ns == before
    assert sorted(p.name for p in out.iterdir()) == ["hu.x.heldout.txt", "hu.x.train.txt", "manifest.json"]


def test_the_same_packages_give_the_same_bytes(fetch):
    [one], [two] = fetch(out="one"), fetch(out="two")
    assert one.train.read_bytes() == two.train.read_bytes()
    assert one.heldout.read_bytes() == two.heldout.read_bytes()


def test_a_source_that_fails_is_reported_and_the_others_are_kept(fetch, tmp_path):
    with pytest.raises(DownloadFailed, match=r"1 of 2 sources failed:\nda\.x: .*no such package"):
        fetch(only="*")
    assert (tmp_path / "out" / "hu.x.train.txt").exists()


def test_a_source_whose_recipe_changed_is_fetched_again(fetch, tmp_path):
    fetch()
    fetch(TABLE.replace("MIT", "GPL"))
    assert manifest(tmp_path / "out")["hu.x"]["licence"] == "GPL"


def test_held_out_text_is_compared_with_every_source_of_its_language(registry, fetch, tmp_path):
    [fetched] = fetch()
    assert fetched.heldout_chars > 0
    # The same package again: what one source holds out the other trains on, but for the runs both hold out.
    (registry / "hu_HU" / "00.txt").unlink()
    x, y = fetch(TABLE + TABLE.replace('name = "x"', 'name = "y"'))
    train = x.train.read_text() + y.train.read_text()
    held = (x.heldout.read_text() + y.heldout.read_text()).split("\n")
    assert not [line for line in held if line and line in train]
    assert manifest(tmp_path / "out")["hu.x"]["compared"] == ["hu.x", "hu.y"]


def test_a_name_that_matches_no_source_is_refused(tmp_path):
    with pytest.raises(BadRequest, match=r"no source that matches fi\.x"):
        build.fetch_corpus(recipe(tmp_path, TABLE), tmp_path / "out", ["hu.x", "fi.x"])


def test_without_apt_the_error_says_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_packages.shutil, "which", lambda name: None)
    with pytest.raises(DownloadFailed, match="Debian or Ubuntu"):
        corpus_packages.Packages(tmp_path).deb("anything")


def test_importing_the_package_does_not_import_torch():
    code = "import sys, nr_serve.train.corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


HUNG = """
import signal, sys
from nr_serve.cli import main
from nr_serve.train.corpus import packages

def hang(self, name):
    (self._folder(name) / "half").write_text("unpacked")
    print("unpacking", flush=True)
    while True:
        signal.pause()

# A background job starts with the first ignored, one under nohup with the second.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
packages.Packages.deb = hang
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code", "left"),
    [(signal.SIGTERM, 143, 0), (signal.SIGHUP, 129, 0), (signal.SIGINT, 130, 0), (signal.SIGKILL, -9, 1)],
)
def test_what_a_stopped_fetch_unpacked_goes_then_or_with_the_next_fetch(fetch, tmp_path, number, code, left):
    path, out = recipe(tmp_path, TABLE), tmp_path / "out"
    command = [sys.executable, "-c", HUNG, "fetch-corpus", str(path), "--out", str(out), "--only", "hu.x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"unpacking\n"
        process.send_signal(number)
        assert process.wait() == code
    assert len(list(out.iterdir())) == left
    fetch()
    assert sorted(p.name for p in out.iterdir()) == ["hu.x.heldout.txt", "hu.x.train.txt", "manifest.json"]


def test_two_processes_do_not_fetch_into_one_folder(fetch, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with held(out, "fetches into"), pytest.raises(Conflict, match=r"another process fetches into .*out"):
        fetch()
    assert fetch()


def test_a_folder_without_room_is_said(fetch, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "write_manifest", full)
    with pytest.raises(CannotWrite, match=r"cannot write .*out: .*No space left"):
        fetch()


def test_a_glob_that_is_none_fails_its_source_alone(fetch):
    two = TABLE.replace('["hu", "da"]', '["hu"]')
    two += two.replace('name = "x"', 'name = "y"').replace("{locale}/*.txt", "/etc/*")
    with pytest.raises(DownloadFailed, match=r"1 of 2 sources failed:\nhu\.y: .*'/etc/\*' is not a glob"):
        fetch(two)


def test_each_stage_of_a_package_is_said(tmp_path, monkeypatch, capsys):
    def client(command, *, cwd=None, env=None):
        if "download" in command:
            (cwd / "p_1_all.deb").write_bytes(bytes(2_500_000))
        return "1"

    monkeypatch.setattr(corpus_packages, "run_client", client)
    monkeypatch.setattr(corpus_packages.Packages, "_prepare_apt", lambda self: {})
    corpus_packages.Packages(tmp_path).deb("p")
    said = capsys.readouterr().err.splitlines()
    assert said == ["corpus: downloading p", "corpus: unpacking p_1_all.deb, 2.5 MB"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_documents_are_counted_on_a_terminal_and_nowhere_else(fetch, monkeypatch, is_terminal):
    terminal = io.StringIO()
    terminal.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", terminal)
    fetch()
    assert ("corpus: hu.x: 0 documents" in terminal.getvalue()) == is_terminal


# From the user's own folder

FOLDER = """
[[source]]
name = "mine"
languages = ["hu"]
kind = "folder"
folder = "texts/{lang}"
files = ["**/*.txt"]
format = "plain"
"""


@pytest.fixture
def mine(tmp_path):
    """The user's corpus recipe beside two files of text, one of them deeper."""
    (tmp_path / "texts" / "hu" / "deep").mkdir(parents=True)
    for n, name in enumerate(("a.txt", "deep/b.txt")):
        text = "\n\n".join(words_of(n, i, 0) + "\n" + words_of(n, i, 1) for i in range(26))
        (tmp_path / "texts" / "hu" / name).write_text(text)
    path = tmp_path / "mine.toml"
    path.write_text(FOLDER)
    return path


def test_a_folder_is_read_held_out_and_listed_without_a_licence(mine, tmp_path):
    [fetched] = build.fetch_corpus(mine, tmp_path / "out")
    train, heldout = fetched.train.read_text(), fetched.heldout.read_text()
    assert fetched.train.name == "hu.mine.train.txt"
    documents = [document for text in (train, heldout) for document in text.rstrip("\n").split("\n\n")]
    assert sorted(documents) == sorted(
        words_of(n, i, 0) + "\n" + words_of(n, i, 1) for n in (0, 1) for i in range(26)
    )
    assert 0.04 < len(heldout) / len(train) < 0.13
    entry = manifest(tmp_path / "out")["hu.mine"]
    assert entry["licence"] == ""
    assert list(entry["versions"]) == ["texts/hu"]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a.txt").write_text((folder / "a.txt").read_text() + "\n\n" + words_of(9, 9)),
        lambda folder: (folder / "a.txt").rename(folder / "aa.txt"),
        lambda folder: (folder / "deep" / "b.txt").unlink(),
        lambda folder: (folder / "c.txt").write_text(words_of(9, 9)),
    ],
    ids=["longer", "renamed", "gone", "new"],
)
def test_a_folder_is_read_again_when_its_files_change_and_only_then(mine, tmp_path, change):
    out = tmp_path / "out"
    [first] = build.fetch_corpus(mine, out)
    before, entry = first.train.stat().st_mtime_ns, manifest(out)["hu.mine"]
    (tmp_path / "texts" / "hu" / "notes.md").write_text("not read")
    assert build.fetch_corpus(mine, out) == [first]
    assert first.train.stat().st_mtime_ns == before
    change(tmp_path / "texts" / "hu")
    [second] = build.fetch_corpus(mine, out)
    assert second.train.stat().st_mtime_ns != before
    assert manifest(out)["hu.mine"]["versions"] != entry["versions"]
    assert build.fetch_corpus(mine, out) == [second]


def test_more_text_of_a_folder_takes_none_of_what_was_held_out_or_trained_on(mine, tmp_path):
    def documents():
        [fetched] = build.fetch_corpus(mine, tmp_path / "out")
        return [set(file.read_text().rstrip("\n").split("\n\n")) for file in (fetched.train, fetched.heldout)]

    train, held = documents()
    (tmp_path / "texts" / "hu" / "0.txt").write_text("\n\n".join(words_of(7, i, 0) for i in range(40)))
    now = documents()
    assert (train - now[0], held - now[1]) == (set(), set())
    assert len(now[0]) > len(train)
    assert len(now[1]) > len(held)


@pytest.mark.parametrize("missing", ["train", "heldout"])
def test_with_one_of_its_files_gone_a_source_is_split_afresh(mine, tmp_path, missing):
    [first] = build.fetch_corpus(mine, tmp_path / "out")
    files = [first.train, first.heldout]
    before = [file.read_text() for file in files]
    (tmp_path / "out" / f"hu.mine.{missing}.txt").unlink()
    build.fetch_corpus(mine, tmp_path / "out")
    assert [file.read_text() for file in files] == before


def test_two_recipes_share_a_folder_and_their_text_of_one_language_is_compared(registry, fetch, mine, tmp_path):
    out = tmp_path / "out"
    [x] = fetch()
    # The user's folder holds the package's text too: what one source holds out the other trains on.
    theirs = [path.read_text() for path in sorted((registry / "hu_HU").iterdir())]
    (tmp_path / "texts" / "hu" / "a.txt").write_text("\n\n".join(theirs))
    [own] = build.fetch_corpus(mine, out)
    assert manifest(out)["hu.x"]["compared"] == manifest(out)["hu.mine"]["compared"] == ["hu.mine", "hu.x"]
    train = set((x.train.read_text() + own.train.read_text()).split("\n")) - {""}
    held = set((x.heldout.read_text() + own.heldout.read_text()).split("\n")) - {""}
    assert held
    assert not held & train
    after = own.train.stat().st_mtime_ns
    [x] = fetch()
    assert x.heldout_chars == manifest(out)["hu.x"]["heldout_chars"] < x.train_chars
    assert own.train.stat().st_mtime_ns == after


@pytest.mark.parametrize(
    ("change", "out", "message"),
    [
        (("texts/{lang}", "my-text"), "out", r"source hu\.mine: there is no folder .*my-text"),
        (("*.txt", "*.doc"), "out", r"texts/hu holds no \*\*/\*\.doc"),
        (("**/*.txt", "/etc/*"), "out", r"'/etc/\*' is not a glob of files in .*texts/hu"),
        (("texts/{lang}", "."), "out", "must not lie in"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_before_anything_is_written(mine, tmp_path, change, out, message):
    mine.write_text(FOLDER.replace(*change))
    with pytest.raises(BadRequest, match=message):
        build.fetch_corpus(mine, tmp_path / out)
    assert not (tmp_path / out).exists()


def test_text_too_short_to_hold_some_out_is_refused_with_its_length(mine, tmp_path):
    (tmp_path / "texts" / "hu" / "deep" / "b.txt").unlink()
    (tmp_path / "texts" / "hu" / "a.txt").write_text(words_of(1))
    said = (
        r"hu\.mine: [\d,]+ characters of text, in paragraphs: 1: too few to hold some out, for a paragraph is"
        " not split"
    )
    with pytest.raises(DownloadFailed, match=said):
        build.fetch_corpus(mine, tmp_path / "out")


def test_a_folder_in_another_encoding_fails_by_file_and_the_other_sources_are_kept(mine, tmp_path):
    mine.write_text(FOLDER + FOLDER.replace('"mine"', '"bad"').replace("texts/{lang}", "bad"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "c.txt").write_bytes("güzel".encode("iso-8859-9"))
    with pytest.raises(DownloadFailed, match=r"hu\.bad: .*bad/c\.txt is not UTF-8: byte 1 "):
        build.fetch_corpus(mine, tmp_path / "out")
    assert (tmp_path / "out" / "hu.mine.train.txt").exists()


def test_a_manifest_from_before_a_field_came_still_counts(fetch, tmp_path):
    out = tmp_path / "out"
    [fetched] = fetch()
    before, entries = fetched.train.stat().st_mtime_ns, manifest(out)
    del entries["hu.x"]["source"]["folder"]
    (out / "manifest.json").write_text(json.dumps(entries))
    fetch()
    assert fetched.train.stat().st_mtime_ns == before
