"""A text file as a source of documents: plain or JSONL, compressed or not."""

from __future__ import annotations

import glob
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nr_serve.train.documents import document_lines, json_text, texts
from nr_serve.train.entries import is_heldout
from nr_serve.train.recipe import BadRecipe

_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}
_UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 file: JSONL if its name says so, else one paragraph per line and an empty line between documents."""

    path: Path
    field: str
    """The field of a JSONL line that holds a document."""

    @property
    def name(self) -> str:
        """The source's name, such as `hu.lohelp` for `hu.lohelp.train.txt`."""
        return ".".join(self.path.name.split(".")[:2])

    @property
    def language(self) -> str:
        """The language in the file's name, such as `hu` for `hu.lohelp.train.txt`."""
        return self.path.name.split(".")[0]

    @property
    def identity(self) -> str:
        """The file's real path, whichever link leads to it."""
        return str(self.path.resolve())

    def __str__(self) -> str:
        return self.path.name

    @property
    def held_out(self) -> bool:
        """Whether the file's name marks held-out text, as in `hu.lohelp.heldout.txt`."""
        return is_heldout(self.path.name)

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON object."""
        suffixes = [suffix for suffix in self.path.suffixes if suffix not in _OPENERS]
        return suffixes[-1:] == [".jsonl"]

    def entry(self, folder: Path) -> str:
        """The file's path below the corpus folder, with glob characters escaped."""
        return glob.escape(self.path.relative_to(folder).as_posix())

    def reads_alike(self, field: str) -> bool:
        """Whether `field` is the field read here, or the file has no fields."""
        return field == self.field or not self.is_jsonl

    def fingerprint(self) -> str:
        """Hash of the file's content, and how it is read."""
        try:
            with self.path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BadRecipe(f"cannot read {self.path}: {error.strerror}") from error
        return f"jsonl {self.field} {content}" if self.is_jsonl else f"text {content}"

    def documents(self, end: str = "") -> Iterator[str]:
        """The documents, with `end` after each.

        Raises BadRecipe, naming the line, for what is not UTF-8 or not the JSON expected.
        """
        lines = (document_lines(text) for text in self._jsonl()) if self.is_jsonl else self._paragraphs()
        for paragraphs in lines:
            yield from texts(paragraphs, end)

    def _paragraphs(self) -> Iterator[list[str]]:
        document: list[str] = []
        for line in self._lines():
            if line.strip():
                document.append(line)
            elif document:
                yield document
                document = []
        yield document

    def _jsonl(self) -> Iterator[str]:
        for number, line in enumerate(self._lines(), 1):
            if line.strip():
                yield json_text(line, self.field, f"{self.path}, line {number}")

    def _lines(self) -> Iterator[str]:
        try:
            with self._open("rt", encoding="utf-8-sig") as file:  # drops a byte order mark
                for line in file:
                    yield line.removesuffix("\n")
        except UnicodeDecodeError as error:
            raise BadRecipe(f"{self.path} is not UTF-8: {self._undecodable()}") from error
        except _UNREADABLE as error:
            raise BadRecipe(f"cannot read {self.path}: {error}") from error

    def _undecodable(self) -> str:
        """Where the first byte is that is not UTF-8; a decoder that reads in chunks cannot tell."""
        at = 0
        with self._open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    bad = at + error.start
                    return f"line {number}, byte {bad} of the text (0x{line[error.start]:02x}): {error.reason}"
                at += len(line)
        return "it ends within a character"

    def _open(self, mode: str, **how: Any) -> IO[Any]:
        opened: IO[Any] = _OPENERS.get(self.path.suffix, open)(self.path, mode, **how)
        return opened
