"""What a document is: paragraphs, one per line, cut into pieces if it is long. Knows nothing of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from nr_serve.train.recipe import BadRecipe

PIECE_CHARACTERS = 8000
"""Documents longer than this are cut between paragraphs, so that one long book does not crowd out others."""


def document_lines(text: str) -> list[str]:
    """One document's paragraphs: its lines that are not blank."""
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def json_text(line: str, field: str, where: str) -> str:
    """The text in a line of JSON. Raises BadRecipe, naming `where`, if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecipe(f"{where} is not JSON: {error}") from error
    return field_text(row, field, where)


def field_text(row: Any, field: str, where: str) -> str:
    """The text in a row. Raises BadRecipe, naming `where`, if there is none."""
    if not isinstance(row, dict) or field not in row:
        raise BadRecipe(f"{where} has no field {field!r}")
    text = row[field]
    if not isinstance(text, str):
        raise BadRecipe(f"{where}: field {field!r} is not text but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecipe(f"{where}: field {field!r} holds half a surrogate pair: {error.reason}") from error
    return text


def texts(paragraphs: list[str], end: str) -> Iterator[str]:
    """The text of a document's pieces, with `end` after the last of them."""
    joined = ["\n".join(piece) for piece in pieces(paragraphs)]
    yield from joined[:-1]
    yield from (text + end for text in joined[-1:])


def pieces(paragraphs: list[str]) -> Iterator[list[str]]:
    """Pieces of a document with these paragraphs, cut between two of them where it exceeds PIECE_CHARACTERS."""
    piece: list[str] = []
    length = 0
    for paragraph in paragraphs:
        if piece and length + len(paragraph) > PIECE_CHARACTERS:
            yield piece
            piece, length = [], 0
        piece.append(paragraph)
        length += len(paragraph)
    if piece:
        yield piece
