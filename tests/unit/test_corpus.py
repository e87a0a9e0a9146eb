"""Text is extracted, cleaned, deduplicated and split as a recipe says."""

import gettext
import gzip
import io
import json
import signal
import struct
import subprocess
import sys

import pytest

from nr_serve.disk import CannotWrite, held
from nr_serve.errors import BadRequest, Conflict, DownloadFailed
from nr_serve.train.corpus import build, clean, extract, man, split
from nr_serve.train.corpus import packages as corpus_packages
from nr_serve.train.corpus.progress import counted
from nr_serve.train.corpus.recipe import Source, read_recipe


def source(**fields):
    values = {"name": "hu.x", "language": "hu", "kind": "deb", "licence": "MIT", "format": "text"} | fields
    return Source(**values)


def documents(reader, data, **fields):
    return list(reader(data.encode() if isinstance(data, str) else data, source(**fields)))


def catalogue(messages):
    """A .mo file of (original, translation) pairs."""
    pairs = [(a.encode(), b.encode()) for a, b in messages]
    start = 28 + 16 * len(pairs)
    tables, body = [b"", b""], b""
    for which in (0, 1):
        for pair in pairs:
            tables[which] += struct.pack("<2I", len(pair[which]), start + len(body))
            body += pair[which] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return head + tables[0] + tables[1] + body


# --- extraction


def test_a_page_gives_its_innermost_blocks_without_navigation():
    page = """<html><head><title>t</title></head><body><nav><p>menu</p></nav><script>x()</script>
    <h1>Cím</h1><table><tr><td><p>egy <b>cella</b></p></td></tr></table><ul><li>pont</li></ul>
    <div class="nav_table"><p>elsó</p></div><pre>code</pre></body></html>"""
    assert documents(extract.html, page) == [["Cím", "egy cella", "pont"]]


def test_a_help_page_gives_titles_and_paragraphs_without_credits():
    page = """<page xmlns="http://projectmallard.org/1.0/"><info><desc>leírás</desc>
    <mal:credit xmlns:mal="http://projectmallard.org/1.0/"><mal:name>N</mal:name><p>név</p></mal:credit></info>
    <title>Cím</title><p>Egy <gui>Gomb</gui> van.</p><screen><p>ls</p></screen></page>"""
    assert documents(extract.mallard, page) == [["leírás", "Cím", "Egy Gomb van."]]


def test_a_manual_page_gives_running_text():
    page = ".TH X 1\n.SH NÉV\nx \\- egy \\fBvastag\\fP szó\n.PP\nfolytatódik\n.I dőlt\n.nf\nkód\n.fi\nvége\n"
    assert man.paragraphs(page) == ["NÉV".replace("NÉV", "x - egy vastag szó"), "folytatódik dőlt", "vége"]


def test_a_catalogue_gives_what_was_translated():
    data = catalogue(
        [("", "Content-Type: text/plain; charset=UTF-8\n"), ("OK", "OK"), ("_Open <b>it</b>", "Meg_nyitás")]
    )
    assert gettext.GNUTranslations(io.BytesIO(data)).gettext("_Open <b>it</b>") == "Meg_nyitás"
    assert documents(extract.mo, data) == [["Megnyitás"]]


def test_a_file_that_is_no_catalogue_is_refused():
    with pytest.raises(ValueError, match="catalogue"):
        documents(extract.mo, b"something else")


def test_package_descriptions_give_heading_paragraphs_and_items():
    listing = """Package: a
Description-md5: 1
Description-hu: rövid cím
 Első sor
 folytatása.
 .
 Lista:
  * egy
  * kettő

Package: b
Description-en: not this
"""
    [document] = documents(extract.ddtp, listing)
    assert [clean.normalise(p) for p in document] == ["rövid cím", "Első sor folytatása.", "Lista:", "egy", "kettő"]


def test_json_lines_give_a_document_each():
    data = "\n".join(json.dumps({"passage": text, "q": "?"}) for text in ("a\nb", "c"))
    assert documents(extract.jsonl, data, field="passage") == [["a", "b"], ["c"]]


def test_rows_of_a_table_join_to_documents():
    rows = "book,verse\n1,first\n1,second\n2,third\n"
    assert documents(extract.table, rows, field="1", document=("0",)) == [["first second"], ["third"]]


def test_plain_text_gives_what_matches():
    obo = 'id: 1\ndef: "A thing." [x]\n\ndef: "Another." [y]\n'
    assert documents(extract.text, obo, match='^def: "([^"]*)"') == [["A thing.", "Another."]]
    assert documents(extract.text, "one\ntwo\n\nthree") == [["one\ntwo", "three"]]


def test_plain_text_gives_a_paragraph_a_line():
    assert documents(extract.plain, "one\r\ntwo\r\n\r\n \nthree\n") == [["one", "two"], ["three", ""]]


@pytest.mark.parametrize("form", ["plain", "text", "fortune"])
def test_the_users_text_in_another_encoding_is_refused_with_file_and_byte(tmp_path, form):
    path = tmp_path / "x.txt"
    path.write_bytes(b"abc\n" + "ığ".encode("iso-8859-9"))
    with pytest.raises(BadRequest, match=r"x\.txt is not UTF-8: byte 4 of the text \(0xfd\)"):
        list(extract.extract(path, source(kind="folder", format=form)))


def test_sayings_are_cut_at_percent_signs():
    assert documents(extract.fortune, "a\n%\nb\n%\nc\n") == [["a\n", "b\n", "c\n"]]


def test_compressed_files_are_read(tmp_path):
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(b"egy"))
    assert list(extract.extract(path, source())) == [["egy"]]


# --- cleaning


def test_a_paragraph_is_normalised_to_one_composed_line():
    assert clean.normalise(" A\u0301rv\u00adíz \n\t tűrő\u200b ") == "Árvíz tűrő"


@pytest.mark.parametrize(
    ("paragraph", "prose"),
    [
        ("Ez egy rövid mondat.", True),
        ("Igen, nem.", False),
        ("a = 12345; b = {67890}; c[0] = d * 4", False),
        ("これは日本語の文章です。", True),
        ("", False),
    ],
)
def test_prose_has_words_and_mostly_letters(paragraph, prose):
    assert clean.is_prose(paragraph) is prose


@pytest.mark.parametrize(
    ("paragraph", "english"),
    [
        ("Click the button to open this dialog.", True),
        ("Positions an object, such as an image or frame, in an open document.", True),
        ("Ha a képet is be kell állítani, a menü és a lap is jó.", False),
        ("Kattintson a gombra a The Times megnyitásához ebben az ablakban most.", False),
        ("Vælg om du vil bruge den anden mappe i stedet for denne.", False),
        ("Het is in de map of op het bureaublad van de gebruiker.", False),
    ],
)
def test_what_a_translation_left_in_english_is_told_apart(paragraph, english):
    assert clean.looks_english(paragraph) is english


def test_untranslated_originals_are_dropped():
    originals = frozenset(["Foo bar baz quux corge"])
    document = ["Foo  bar baz quux corge", "Ez egy magyar mondat."]
    assert clean.clean_document(document, translated=True, originals=originals) == ["Ez egy magyar mondat."]


# --- deduplication and splitting


def sentence(*numbers):
    return " ".join("szó" + "abcdefghij"[n % 10] * (n // 10 + 1) for n in numbers)


def test_exact_and_near_duplicates_go_and_the_first_stays():
    long = sentence(*range(40))
    near = long + " még"
    assert split.deduplicate([[long, long], [near], [sentence(*range(50, 90))]]) == [
        [long],
        [sentence(*range(50, 90))],
    ]


def test_held_out_text_is_about_its_share_and_shares_nothing_with_the_rest():
    made = [[sentence(*range(1000 + 60 * i, 1060 + 60 * i))] for i in range(300)]
    made = [[f"{chr(97 + i % 26)}{chr(97 + i // 26)} ".join(d[0].split())] for i, d in enumerate(made)]
    train, held = split.hold_out(made)
    assert 0.06 < split.size(held) / split.size(made) < 0.1
    assert not {id(d) for d in train} & {id(d) for d in held}
    assert len(train) + len(held) == len(made)


def test_held_out_paragraphs_that_leak_are_dropped():
    same = sentence(*range(30))
    made = [[f"{sentence(*range(40 + i, 70 + i))}"] for i in range(0, 4000, 40)] + [[same]]
    train, held = split.hold_out([[same], *made])
    assert [same] in train
    assert [same] not in held


def test_long_documents_are_cut_between_paragraphs():
    parts = list(split.cut([["x" * 5000, "y" * 5000, "z"], ["w"]]))
    assert parts == [["x" * 5000], ["y" * 5000, "z"], ["w"]]


def test_thinning_takes_documents_evenly():
    kept = split.thin([[str(i) * 10] for i in range(10)], 50)
    assert [document[0][0] for document in kept] == ["1", "3", "5", "7", "9"]
    assert split.thin([["a"], ["b"]], 99) == [["a"], ["b"]]


# --- recipes


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
        (("kind =", "knid ="), "unknown keys: knid"),
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
        (("licence", "format2"), "unknown keys"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_fault(tmp_path, change, message):
    with pytest.raises(BadRequest, match=message):
        read_recipe(recipe(tmp_path, TABLE.replace(*change)))


# --- the whole


class FakePackages:
    """Packages that lie in a folder already; "broken-*" cannot be had."""

    root = None

    def __init__(self, work, languages=()):
        self.versions = {}

    def deb(self, name):
        if name == "p-da":
            raise DownloadFailed("no such package")
        self.versions[name] = "1.0"
        return self.root


@pytest.fixture
def registry(tmp_path, monkeypatch):
    root = tmp_path / "package"
    (root / "hu_HU").mkdir(parents=True)
    for i in range(60):
        words = [
            f"szó{chr(97 + i % 26)}{chr(97 + i // 26)}{chr(97 + j % 26)}{chr(97 + j // 26)}" for j in range(60)
        ]
        (root / "hu_HU" / f"{i:02}.txt").write_text(" ".join(words))
    monkeypatch.setattr(FakePackages, "root", root)
    monkeypatch.setattr(build, "Packages", FakePackages)
    return root


def test_a_corpus_is_written_with_its_manifest_and_found_again(registry, tmp_path):
    out = tmp_path / "out"
    path = recipe(tmp_path, TABLE)
    [fetched] = build.fetch_corpus(path, out, ["hu.*"])
    text = fetched.train.read_text()
    assert fetched.train.name == "hu.x.train.txt"
    assert sum(len(line) for line in text.splitlines()) == fetched.train_chars
    assert text.count("\n\n") + 1 + fetched.heldout.read_text().count("\n\n") + 1 == 60
    entry = json.loads((out / "manifest.json").read_text())["hu.x"]
    assert (entry["licence"], entry["versions"]) == ("MIT", {"p-hu": "1.0"})

    before = fetched.train.stat().st_mtime_ns
    assert build.fetch_corpus(path, out, ["hu.x"]) == [fetched]
    assert fetched.train.stat().st_mtime_ns == before
    assert sorted(p.name for p in out.iterdir()) == ["hu.x.heldout.txt", "hu.x.train.txt", "manifest.json"]


def test_the_same_packages_give_the_same_bytes(registry, tmp_path):
    path = recipe(tmp_path, TABLE)
    one, two = (build.fetch_corpus(path, tmp_path / name, ["hu.x"])[0] for name in ("one", "two"))
    assert one.train.read_bytes() == two.train.read_bytes()
    assert one.heldout.read_bytes() == two.heldout.read_bytes()


def test_a_source_that_fails_is_reported_and_the_others_are_kept(registry, tmp_path):
    with pytest.raises(DownloadFailed, match=r"1 of 2 sources failed:\nda\.x: .*no such package"):
        build.fetch_corpus(recipe(tmp_path, TABLE), tmp_path / "out")
    assert (tmp_path / "out" / "hu.x.train.txt").exists()


def test_a_source_whose_recipe_changed_is_fetched_again(registry, tmp_path):
    build.fetch_corpus(recipe(tmp_path, TABLE), tmp_path / "out", ["hu.x"])
    changed = recipe(tmp_path, TABLE.replace("MIT", "GPL"))
    build.fetch_corpus(changed, tmp_path / "out", ["hu.x"])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["hu.x"]["licence"] == "GPL"


def test_held_out_text_is_compared_with_every_source_of_its_language(registry, tmp_path):
    twin = TABLE + TABLE.replace('name = "x"', 'name = "y"')
    fetched = build.fetch_corpus(recipe(tmp_path, TABLE), tmp_path / "out", ["hu.x"])
    assert fetched[0].heldout_chars > 0
    # The same package again: what one source holds out the other trains on, but for the runs both hold out.
    (registry / "hu_HU" / "00.txt").unlink()
    x, y = build.fetch_corpus(recipe(tmp_path, twin), tmp_path / "out", ["hu.*"])
    train = x.train.read_text() + y.train.read_text()
    held = (x.heldout.read_text() + y.heldout.read_text()).split("\n")
    assert not [line for line in held if line and line in train]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["hu.x"]["compared"] == ["hu.x", "hu.y"]


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

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
packages.Packages.deb = hang
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code", "left"), [(signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 0), (signal.SIGKILL, -9, 1)]
)
def test_what_a_stopped_fetch_unpacked_goes_then_or_with_the_next_fetch(registry, tmp_path, number, code, left):
    path, out = recipe(tmp_path, TABLE), tmp_path / "out"
    command = [sys.executable, "-c", HUNG, "fetch-corpus", str(path), "--out", str(out), "--only", "hu.x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"unpacking\n"
        process.send_signal(number)
        assert process.wait() == code
    assert len(list(out.iterdir())) == left
    build.fetch_corpus(path, out, ["hu.x"])
    assert sorted(p.name for p in out.iterdir()) == ["hu.x.heldout.txt", "hu.x.train.txt", "manifest.json"]


def test_two_processes_do_not_fetch_into_one_folder(registry, tmp_path):
    path, out = recipe(tmp_path, TABLE), tmp_path / "out"
    out.mkdir()
    with held(out, "fetches into"), pytest.raises(Conflict, match=r"another process fetches into .*out"):
        build.fetch_corpus(path, out, ["hu.x"])
    assert build.fetch_corpus(path, out, ["hu.x"])


def test_a_folder_without_room_is_said(registry, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "write_manifest", full)
    with pytest.raises(CannotWrite, match=r"cannot write .*out: .*No space left"):
        build.fetch_corpus(recipe(tmp_path, TABLE), tmp_path / "out", ["hu.x"])


def test_a_glob_that_is_none_fails_its_source_alone(registry, tmp_path):
    two = TABLE.replace('["hu", "da"]', '["hu"]')
    two += two.replace('name = "x"', 'name = "y"').replace("{locale}/*.txt", "/etc/*")
    with pytest.raises(DownloadFailed, match=r"1 of 2 sources failed:\nhu\.y: .*'/etc/\*' is not a glob"):
        build.fetch_corpus(recipe(tmp_path, two), tmp_path / "out")


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


def test_documents_are_counted_on_a_terminal_and_nowhere_else(monkeypatch, capsys):
    assert list(counted("abc", "hu.x")) == list("abc")
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(counted(iter("abc"), "hu.x")) == list("abc")
    assert "corpus: hu.x: 0 documents" in terminal.getvalue()


# --- the user's own folder

FOLDER = """
[[source]]
name = "mine"
languages = ["hu"]
kind = "folder"
folder = "texts/{lang}"
files = ["**/*.txt"]
format = "plain"
"""


def words_of(*numbers):
    """60 words that no other numbers give."""
    stem = "".join(chr(97 + n) for n in numbers)
    return " ".join(f"{stem}{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(60))


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


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


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


def test_two_recipes_share_a_folder_and_their_text_of_one_language_is_compared(registry, mine, tmp_path):
    out = tmp_path / "out"
    [x] = build.fetch_corpus(recipe(tmp_path, TABLE), out, ["hu.x"])
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
    [x] = build.fetch_corpus(recipe(tmp_path, TABLE), out, ["hu.x"])
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
    with pytest.raises(DownloadFailed, match=r"hu\.mine: .*[\d,]+ characters of text are too few to hold some out"):
        build.fetch_corpus(mine, tmp_path / "out")


def test_a_folder_in_another_encoding_fails_by_file_and_the_other_sources_are_kept(mine, tmp_path):
    mine.write_text(FOLDER + FOLDER.replace('"mine"', '"bad"').replace("texts/{lang}", "bad"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "c.txt").write_bytes("güzel".encode("iso-8859-9"))
    with pytest.raises(DownloadFailed, match=r"hu\.bad: .*bad/c\.txt is not UTF-8: byte 1 "):
        build.fetch_corpus(mine, tmp_path / "out")
    assert (tmp_path / "out" / "hu.mine.train.txt").exists()


def test_a_manifest_from_before_a_field_came_still_counts(registry, tmp_path):
    out = tmp_path / "out"
    [fetched] = build.fetch_corpus(recipe(tmp_path, TABLE), out, ["hu.x"])
    before, entries = fetched.train.stat().st_mtime_ns, manifest(out)
    del entries["hu.x"]["source"]["folder"]
    (out / "manifest.json").write_text(json.dumps(entries))
    build.fetch_corpus(recipe(tmp_path, TABLE), out, ["hu.x"])
    assert fetched.train.stat().st_mtime_ns == before
