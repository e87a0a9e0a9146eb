"""Text is extracted, cleaned, deduplicated and split."""

import gettext
import gzip
import io
import json
import struct

import pytest

from nr_serve.errors import BadRequest
from nr_serve.train.corpus import clean, extract, man, split
from nr_serve.train.corpus.recipe import Source
from nr_serve.train.documents import pieces


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


# Extraction


def test_a_page_gives_its_innermost_blocks_without_navigation():
    page = """<html><head><title>t</title></head><body><nav><p>menu</p></nav><script>x()</script>
    <h1>Cím</h1><table><tr><td><p>egy <b>cella</b></p></td></tr></table><ul><li>pont</li></ul>
    <div class="nav_table"><p>elsó</p></div><pre>code</pre></body></html>"""
    assert documents(extract.html, page) == [["Cím", "egy cella", "pont"]]


def test_a_page_of_the_users_own_may_call_its_text_contents():
    page = """<div class="contents"><div class="toc"><p>1. Cím</p></div><h1>Cím</h1><p>egy</p></div>
    <div class="stock"><p>kettő</p></div>"""
    assert documents(extract.html, page, kind="folder", folder="x") == [["Cím", "egy", "kettő"]]


def test_a_page_of_the_users_own_gives_all_its_text():
    page = """<html><head><title>t</title></head><body>elöl<!-- note --><div>egy <b>szó</b><br>kettő
    <ul><li>pont<ul><li>alpont</li></ul>vége</li></ul>után</div><table><tr><td>cella</td><td><p>másik</p></td></tr>
    </table><script>x()</script>futtassa:<pre>ls</pre>aztán<hr>tovább<nav><p>menu</p></nav>és
    <fieldset><legend>cím</legend>szöveg</fieldset></body></html>"""
    [found] = documents(extract.html, page, kind="folder", folder="x")
    paragraphs = ["elöl", "egy szó kettő", "pont", "alpont", "vége", "után", "cella", "másik"]
    paragraphs += ["futtassa:", "aztán", "tovább", "és", "cím", "szöveg"]
    assert [" ".join(paragraph.split()) for paragraph in found] == paragraphs


def test_a_page_of_docbook_gives_its_paragraphs(recwarn):
    page = """<?xml version="1.0" encoding="UTF-8"?><html xmlns="http://www.w3.org/1999/xhtml"><body>
    <div class="section"><div class="para">első <b>bekezdés</b></div><div class="para">második
    <ul><li><div class="para">pont</div></li></ul></div></div></body></html>"""
    assert documents(extract.html, page) == [["első bekezdés", "pont"]]
    assert not recwarn.list


def test_a_help_page_gives_titles_and_paragraphs_without_credits():
    page = """<page xmlns="http://projectmallard.org/1.0/"><info><desc>leírás</desc>
    <mal:credit xmlns:mal="http://projectmallard.org/1.0/"><mal:name>N</mal:name><p>név</p></mal:credit></info>
    <title>Cím</title><p>Egy <gui>Gomb</gui> van.</p><screen><p>ls</p></screen></page>"""
    assert documents(extract.mallard, page) == [["leírás", "Cím", "Egy Gomb van."]]


def test_a_manual_page_gives_running_text():
    page = ".TH X 1\n.SH NÉV\nx \\- egy \\fBvastag\\fP szó\n.PP\nfolytatódik\n.I dőlt\n.nf\nkód\n.fi\nvége\n"
    assert man.paragraphs(page) == ["x - egy vastag szó", "folytatódik dőlt", "vége"]


def test_what_only_moves_or_computes_leaves_nothing_in_a_manual_pages_text():
    page = "hello\\c\n\\h'1i'egy\\w'két' \\n(.lkettő\\n[x] \\v'-.4m'három\n"
    assert man.paragraphs(page) == ["hello egy kettő három"]


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
    texts = ("a\nb", "c\u2028d")
    data = "\n".join(json.dumps({"passage": text, "q": "?"}, ensure_ascii=False) for text in texts)
    assert documents(extract.jsonl, data, field="passage") == [["a", "b"], ["c\u2028d"]]
    marked = data.encode("utf-8-sig")
    assert documents(extract.jsonl, marked, field="passage") == [["a", "b"], ["c\u2028d"]]


@pytest.mark.parametrize("value", [None, ["a"], 3])
def test_a_field_that_is_not_text_is_refused_with_its_line(value):
    data = '{"passage": "a"}\n' + json.dumps({"passage": value})
    with pytest.raises(BadRequest, match="line 2: field 'passage' is not text"):
        documents(extract.jsonl, data, field="passage")


def test_rows_of_a_table_join_to_documents():
    rows = "book,verse\n1,first\n1,second\n2,third\n"
    assert documents(extract.table, rows, field="1", document=("0",)) == [["first second"], ["third"]]


def test_plain_text_gives_what_matches():
    obo = 'id: 1\ndef: "A thing." [x]\n\ndef: "Another." [y]\n'
    assert documents(extract.text, obo, match='^def: "([^"]*)"') == [["A thing.", "Another."]]
    assert documents(extract.text, obo, match='^def: "(A(n?)[^"]*)"') == [["A thing.", "Another."]]
    assert documents(extract.text, "one\ntwo\n\nthree") == [["one\ntwo", "three"]]


def test_plain_text_gives_a_paragraph_a_line():
    assert documents(extract.plain, "one\r\ntwo\r\n\r\n \nthree\n") == [["one", "two"], ["three", ""]]


@pytest.mark.parametrize("form", ["plain", "text", "fortune"])
def test_the_users_text_in_another_encoding_is_refused_with_file_and_byte(tmp_path, form):
    path = tmp_path / "x.txt"
    path.write_bytes(b"abc\n" + "ığ".encode("iso-8859-9"))
    with pytest.raises(BadRequest, match=r"x\.txt is not UTF-8: byte 4 of the text \(0xfd\)"):
        list(extract.extract(path, source(kind="folder", format=form)))


@pytest.mark.parametrize(
    ("name", "form", "data", "message"),
    [
        ("x.csv", "csv", b"id;text\n1;abc\n", r"x\.csv, line 2: there is no column 1, .*; commas make 1"),
        ("x.csv", "csv", b"id,text\n1,abc\n\n2\n", r"x\.csv, line 4: there is no column 1"),
        ("x.csv", "csv", b'id,text\n1,"' + b"x" * 200_000, r"x\.csv, line 2: .* not closed: field larger than"),
        ("x.txt.gz", "text", b"not gzip", r"cannot read .*x\.txt\.gz as gzip: Not a gzipped file"),
        (
            "x.txt.gz",
            "text",
            gzip.compress(b"abc", mtime=0)[:-9],
            r"cannot read .*x\.txt\.gz as gzip: Compressed file",
        ),
        ("x.mo", "mo", b"something else", r"cannot read .*x\.mo as mo: not a message catalogue"),
        ("x.mo", "mo", b"\xde\x12\x04\x95", r"cannot read .*x\.mo as mo: unpack requires"),
    ],
)
def test_what_is_not_of_its_format_is_refused_with_the_file(tmp_path, name, form, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadRequest, match=message):
        list(extract.extract(tmp_path / name, source(format=form, field="1")))


def test_sayings_are_cut_at_percent_signs():
    assert documents(extract.fortune, "a\n%\nb\n%\nc\n") == [["a\n", "b\n", "c\n"]]


def test_compressed_files_are_read(tmp_path):
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(b"egy"))
    assert list(extract.extract(path, source())) == [["egy"]]


# Cleaning


def test_a_paragraph_is_normalised_to_one_composed_line():
    assert clean.normalise(" A\u0301rv\u00adíz \n\t tűrő\u200b ") == "Árvíz tűrő"
    assert clean.normalise("egy\u2028kettő\x0chárom\x85négy\u2029öt") == "egy kettő három négy öt"
    assert clean.normalise("می\u200cروم") == "می\u200cروم"


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
    "sentence",
    ["यह हिन्दी में एक वाक्य है", "இது தமிழில் ஒரு வாக்கியம்", "ఇది తెలుగులో ఒక వాక్యం", "এটি বাংলায় একটি বাক্য", "Ô̂ng ấy"],
)
def test_a_word_keeps_the_signs_that_it_is_spelt_with(sentence):
    assert clean.words(sentence) == sentence.lower().split()


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


# Deduplication and splitting


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


@pytest.mark.parametrize(("front", "behind"), [(0, 50), (50, 0), (7, 0)])
def test_what_was_trained_on_or_held_out_before_stays_so(front, behind):
    made = [[f"{i} " + sentence(*range(60 * i, 60 * i + 40)), f"{i} vége"] for i in range(300 + front + behind)]
    train, held = split.hold_out(made[front : front + 300])
    again = split.hold_out(made, *({p for d in part for p in d} for part in (train, held)))
    assert all(document in again[0] for document in train)
    assert all(document in again[1] for document in held)
    assert len(again[0]) + len(again[1]) == len(made)
    assert len(again[0]) > len(train)


def paragraphs(first: int, count: int) -> list[str]:
    return [f"{i} " + sentence(*range(40 * i, 40 * i + 30)) for i in range(first, first + count)]


def test_a_long_document_cut_at_other_places_keeps_each_paragraph_where_it_was():
    text = paragraphs(0, 400)
    train, held = split.hold_out(list(pieces(text)))
    before = [{p for d in part for p in d} for part in (train, held)]
    assert all(before)
    changed = [*paragraphs(900, 3), *text[:200], *paragraphs(950, 2), *text[200:]]
    again = split.hold_out(list(pieces(changed)), *before)
    now = [{p for d in part for p in d} for part in again]
    assert [old - new for old, new in zip(before, now, strict=True)] == [set(), set()]
    assert now[0] | now[1] == set(changed)


def test_where_there_is_too_much_what_was_kept_before_comes_first():
    made = [[each] for each in paragraphs(0, 100)]
    kept = split.thin(made, split.size(made) / 4)
    known = {p for d in kept for p in d}
    more = [[each] for each in paragraphs(200, 100)]
    assert split.thin([*more, *made], split.size(kept) + 1, known) == kept
    with_room = split.thin([*more, *made], 2 * split.size(kept), known)
    assert all(document in with_room for document in kept)
    assert 1.7 < split.size(with_room) / split.size(kept) < 2.1
    assert 0.4 < split.size(split.thin(made, split.size(kept) / 2, known)) / split.size(kept) < 0.6


def test_held_out_paragraphs_that_leak_are_dropped():
    same = sentence(*range(30))
    made = [[f"{sentence(*range(40 + i, 70 + i))}"] for i in range(0, 4000, 40)] + [[same]]
    train, held = split.hold_out([[same], *made])
    assert [same] in train
    assert [same] not in held


def test_long_documents_are_cut_between_paragraphs():
    assert list(pieces(["x" * 5000, "y" * 5000, "z"])) == [["x" * 5000], ["y" * 5000, "z"]]


def test_thinning_takes_documents_evenly():
    kept = split.thin([[str(i) * 10] for i in range(10)], 50)
    assert [document[0][0] for document in kept] == ["1", "3", "5", "7", "9"]
    assert split.thin([["a"], ["b"]], 99) == [["a"], ["b"]]
