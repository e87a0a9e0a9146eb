"""Answers as JSON, in parts: the interpreter stands still while `json.dumps` runs, and large answers take long."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from fastapi.responses import JSONResponse

F = TypeVar("F")
PART = 64
"""Entries of a list that are written at once; each may hold a token with its likeliest others."""


class Json(JSONResponse, Generic[F]):
    """A JSON response with a body of type F. Only the type checker checks the body; it is sent as it is."""

    def __init__(self, body: F, status: int = 200) -> None:
        super().__init__(body, status)


class LargeJson(Json[F]):
    """The same for an answer that may be large: it is written in parts."""

    def render(self, content: Any) -> bytes:
        """The body, as `Json` writes it."""
        return in_parts(content, ensure_ascii=False, allow_nan=False)


def in_parts(body: Mapping[str, Any], **options: Any) -> bytes:
    """The body as `json.dumps` with these options writes it, without spaces."""
    encoder = json.JSONEncoder(separators=(",", ":"), **options)
    return b"".join(part.encode() for part in _parts(body, encoder))


def _parts(body: Mapping[str, Any], encoder: json.JSONEncoder) -> Iterator[str]:
    before = "{"
    for key, value in body.items():
        yield f"{before}{encoder.encode(key)}:"
        before = ","
        if isinstance(value, dict) and value:
            yield from _parts(value, encoder)
        elif isinstance(value, list):
            yield from _list_parts(value, encoder, whole=key != "choices")
        else:
            yield encoder.encode(value)
    yield "}"


def _list_parts(values: list[Any], encoder: json.JSONEncoder, *, whole: bool) -> Iterator[str]:
    """With `whole`, its entries are small."""
    before = "["
    for at in range(0, len(values), PART if whole else 1):
        yield before
        before = ","
        if whole:
            yield encoder.encode(values[at : at + PART])[1:-1]
        else:
            yield from _parts(values[at], encoder)
    yield "]" if values else "[]"
