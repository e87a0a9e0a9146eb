"""Reads paragraphs from files: one reader per format, each from a file's bytes to documents."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from bs4 import BeautifulSoup, NavigableString, Tag, XMLParsedAsHTMLWarning

from nr_serve.errors import BadRequest
from nr_serve.train.corpus import man
from nr_serve.train.corpus.recipe import Source
from nr_serve.train.corpus.split import Document
from nr_serve.train.documents import json_text

HTML_BLOCKS = ("p", "li", "dt", "dd", "td", "th", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "figcaption")
HTML_CONTAINERS = (
    *("body", "main", "article", "section", "div", "figure", "details", "summary", "dialog", "address", "center"),
    *("ul", "ol", "dl", "table", "caption", "tr", "fieldset", "legend", "hgroup"),
)
HTML_DROPPED = ("script", "style", "pre", "nav", "header", "footer", "aside", "head", "form", "button")
XML_BLOCKS = ("p", "title", "desc", "cite", "td", "para", "simpara", "term", "subtitle")
XML_DROPPED = (
    "credit",
    "license",
    "revision",
    "include",
    "code",
    "screen",
    "programlisting",
    "comment",
    "years",
    "legalnotice",
    "copyright",
    "authorgroup",
    "revhistory",
    "publisher",
    "synopsis",
    "bookinfo",
)
CONTENTS_TABLES = re.compile(r"nav_table|toc|contents|tocframe")  # links around a page's text, in packages
OWN_CONTENTS_TABLES = re.compile(r"^(toc|table-of-contents)$")  # in pages of all kinds, `contents` may be the text
MO_MAGIC = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}
UI_MESSAGES = 60  # messages per document: message catalogues have no documents
FORTUNES = 20  # sayings per document
PASSAGE_CHARS = 400  # rows of a table are joined into paragraphs of at least this length
TAG = re.compile(r"<[^<>]{1,200}>")
MNEMONIC = re.compile(r"(?<!\w)[_~&](?=\w)|(?<=\w)[_~&](?=\w)|\(?[_~&]\w\)")


def extract(path: Path, source: Source) -> Iterator[Document]:
    """Yield the documents in the file at `path`, uncleaned; a file with the suffix .gz is decompressed first.

    Raises `BadRequest`, naming the file, for what is not of the source's format, and for text that is not UTF-8, if
    the format requires UTF-8.
    """
    data = _content(path)
    try:
        yield from READERS[source.format](data, source)
    except BadRequest as error:
        raise BadRequest(f"{path}, {error.message}") from error
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise BadRequest(f"{path} is not UTF-8: byte {error.start} of the text (0x{bad:02x})") from error
    except (ValueError, LookupError, struct.error) as error:
        raise BadRequest(f"cannot read {path} as {source.format}: {error}") from error


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise BadRequest(f"cannot read {path} as gzip: {error}") from error


def html(data: bytes, source: Source) -> Iterator[Document]:
    """Yield the running text of a page, a paragraph a block.

    Packages' pages are all alike: their text stands in innermost blocks (paragraphs, list items, table cells,
    headings), and nothing else is read. In the user's own it may stand anywhere, so all of it is read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)  # XHTML is parsed as HTML
        soup = BeautifulSoup(data, "lxml")
    own = source.kind == "folder"
    for tag in soup.find_all(class_=OWN_CONTENTS_TABLES if own else CONTENTS_TABLES):
        tag.decompose()
    for tag in soup.find_all("div", class_="para"):
        tag.name = "p"  # DocBook's stylesheets write paragraphs as such divs
    yield _all_text(soup) if own else _blocks(soup, HTML_BLOCKS, HTML_DROPPED)


def mallard(data: bytes, source: Source) -> Iterator[Document]:
    """Yield the text blocks of a Mallard or DocBook page."""
    yield _blocks(BeautifulSoup(data, "lxml-xml"), XML_BLOCKS, XML_DROPPED)


def _blocks(soup: BeautifulSoup, blocks: tuple[str, ...], dropped: tuple[str, ...]) -> Document:
    """The text of each block that has no other block in it."""
    for tag in soup.find_all(lambda tag: tag.name.rpartition(":")[2] in dropped):
        if not tag.decomposed:
            tag.decompose()
    found = [tag for tag in soup.find_all(blocks) if isinstance(tag, Tag)]
    return [tag.get_text() for tag in found if tag.find(blocks) is None]


def _all_text(soup: BeautifulSoup) -> Document:
    """All text of a page, a new paragraph wherever a block begins or ends, also one that is dropped."""
    for tag in soup.find_all([*HTML_DROPPED, "hr"]):
        tag.name, tag.string = "p", "\n"
    for tag in soup.find_all("br"):
        tag.replace_with("\n")
    strings = (string for string in soup.find_all(string=True) if type(string) is NavigableString)  # no comment
    runs = itertools.groupby(strings, key=lambda string: id(string.find_parent(HTML_BLOCKS + HTML_CONTAINERS)))
    return [paragraph for _, run in runs if (paragraph := "".join(run)).strip()]


def man_page(data: bytes, source: Source) -> Iterator[Document]:
    """Yield the running text of a manual page."""
    yield man.paragraphs(_decoded(data, source))


def mo(data: bytes, source: Source) -> Iterator[Document]:
    """Yield the translations in a message catalogue, except those equal to their originals."""
    lines = [line for message in _messages(data) for line in _message_lines(message)]
    yield from ([*chunk] for chunk in _chunks(lines, UI_MESSAGES))


def _messages(data: bytes) -> Iterator[str]:
    """Yield the translated strings of a .mo file; of a plural, the first form."""
    order = MO_MAGIC.get(data[:4])
    if order is None:
        raise ValueError("not a message catalogue")
    count, originals, translations = struct.unpack(f"{order}3I", data[8:20])
    for i in range(count):
        original, translation = (_mo_string(data, order, table + 8 * i) for table in (originals, translations))
        if original and original.rpartition(b"\x04")[2] != translation:
            yield translation.partition(b"\0")[0].decode("utf-8", errors="replace")


def _mo_string(data: bytes, order: str, entry: int) -> bytes:
    length, offset = struct.unpack(f"{order}2I", data[entry : entry + 8])
    return data[offset : offset + length]


def _message_lines(message: str) -> list[str]:
    return MNEMONIC.sub("", TAG.sub(" ", message.replace("\\n", "\n"))).split("\n")


def text(data: bytes, source: Source) -> Iterator[Document]:
    """Yield plain text: what `match` finds, or else the parts between blank lines."""
    content = _decoded(data, source)
    if source.match:
        yield [found[1] or "" for found in re.finditer(source.match, content, re.MULTILINE)]
    else:
        yield re.split(r"\n\s*\n", content)


def plain(data: bytes, source: Source) -> Iterator[Document]:
    """Yield the documents between blank lines, one paragraph per line."""
    for document in re.split(r"\n\s*\n", data.decode("utf-8").replace("\r\n", "\n")):
        yield document.split("\n")


def fortune(data: bytes, source: Source) -> Iterator[Document]:
    """Yield sayings, which are separated by lines with only a %."""
    sayings = re.split(r"^%\n", _decoded(data, source), flags=re.MULTILINE)
    yield from ([*chunk] for chunk in _chunks(sayings, FORTUNES))


def jsonl(data: bytes, source: Source) -> Iterator[Document]:
    """Yield one document per JSON line, from its field, one paragraph per line of the field."""
    lines = data.decode("utf-8-sig").split("\n")  # not splitlines(), which also splits at U+2028
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield json_text(line, source.field, f"line {number}").split("\n")


def table(data: bytes, source: Source) -> Iterator[Document]:
    """Yield one document per run of rows that agree in the `document` columns; the first row is a heading."""
    text_column, key_columns = int(source.field), [int(column) for column in source.document]
    rows = _rows(data.decode("utf-8"), max([text_column, *key_columns]))
    for _, run in itertools.groupby(rows, key=lambda row: [row[column] for column in key_columns]):
        yield _joined(row[text_column] for row in run)


def _rows(text: str, last_column: int) -> Iterator[list[str]]:
    """The rows after the heading, without empty ones. Raises BadRequest, naming the line, for a short one."""
    reader = csv.reader(io.StringIO(text))
    line = 1
    try:
        next(reader, None)
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) <= last_column:
                fault = f"there is no column {last_column}, counted from 0; commas make {len(row)}"
                raise BadRequest(f"line {line}: {fault}")
            if row:
                yield row
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadRequest(f"line {line}: no row of csv, or a quotation mark is not closed: {error}") from error


def _joined(pieces: Iterator[str]) -> Document:
    paragraphs: Document = []
    for piece in pieces:
        if paragraphs and len(paragraphs[-1]) < PASSAGE_CHARS:
            paragraphs[-1] += " " + piece
        else:
            paragraphs.append(piece)
    return paragraphs


def ddtp(data: bytes, source: Source) -> Iterator[Document]:
    """Yield one document per description in apt's list: its heading, then its paragraphs."""
    for stanza in data.decode("utf-8", errors="replace").split("\n\n"):
        _, found, description = stanza.partition(f"\nDescription-{source.language}: ")
        if found:
            heading, _, body = description.partition("\n")
            yield [heading, *_description_paragraphs(body)]


def _description_paragraphs(body: str) -> Document:
    """Undo Debian's layout: paragraphs are separated by " .", and list items begin with a mark."""
    marked = re.sub(r"^ (\.$|\s*[-*+•]\s)", "\n", body, flags=re.MULTILINE)
    return re.split(r"\n\s*\n", marked)


def _decoded(data: bytes, source: Source) -> str:
    """Decode text. In packages invalid UTF-8 is replaced; in the user's own files it is an error."""
    return data.decode("utf-8", errors="strict" if source.kind == "folder" else "replace")


def _chunks(items: list[str], length: int) -> Iterator[list[str]]:
    for start in range(0, len(items), length):
        yield items[start : start + length]


READERS: dict[str, Callable[[bytes, Source], Iterator[Document]]] = {
    "html": html,
    "mallard": mallard,
    "man": man_page,
    "mo": mo,
    "text": text,
    "plain": plain,
    "fortune": fortune,
    "jsonl": jsonl,
    "csv": table,
    "ddtp": ddtp,
}
