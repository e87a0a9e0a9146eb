"""Sources of documents: which a recipe names, and how they are read together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from nr_serve.train.entries import DATASETS, NOT
from nr_serve.train.globs import match_files
from nr_serve.train.recipe import BadRecipe
from nr_serve.train.text.dataset import Dataset
from nr_serve.train.text.text_file import TextFile

OPEN_SOURCES = 64
"""Most sources open at once when several are read in turn: each is an open file or connection."""


class Source(Protocol):
    """Something that contains documents."""

    @property
    def name(self) -> str:
        """Class of its text when it is original or held-out text."""

    @property
    def language(self) -> str:
        """Class of its text when it is background text."""

    @property
    def identity(self) -> str:
        """Identifies the source, however it is written in the recipe."""

    @property
    def held_out(self) -> bool:
        """Whether its name says that it is held-out text, which nothing may train on."""

    def entry(self, folder: Path) -> str:
        """How a recipe names this source, when the corpus is in `folder`."""

    def reads_alike(self, field: str) -> bool:
        """Whether a recipe with this `text_field` reads the same documents from it."""

    def fingerprint(self) -> str:
        """Hash of everything that its documents depend on."""

    def documents(self, end: str = "") -> Iterator[str]:
        """The documents, with long ones cut, and `end` after each.

        Raises BadRecipe, saying where, for what is not text.
        """


def find_sources(folder: Path, written: Iterable[str], field: str = "text") -> list[Source]:
    """The files of `folder` that match the globs, sorted, then the data sets in order.

    Raises BadRecipe for a glob that matches no file, and for a source that is listed twice.
    """
    listed = list(written)
    globs = [each for each in listed if not each.startswith(DATASETS)]
    found: list[Source] = [TextFile(path, field) for path in find_files(folder, globs)]
    found += [Dataset.parse(each, folder, field) for each in listed if each.startswith(DATASETS)]
    seen = set[str]()
    for source in found:
        if source.identity in seen:
            raise BadRecipe(f"{source} is listed twice")
        seen.add(source.identity)
    return found


def find_files(folder: Path, globs: Iterable[str]) -> list[Path]:
    """Files of `folder` that match, sorted; a glob after `!` removes files matched before it.

    Raises BadRecipe naming all globs that match no file, and if no file is left.
    """
    globs = list(globs)
    check_globs(folder, globs)
    found: list[Path] = []
    for pattern in globs:
        matches = match_files(folder, pattern.removeprefix(NOT))
        if pattern.startswith(NOT):
            found = [path for path in found if path not in matches]
        else:
            found += matches
        if not found:
            raise BadRecipe(f"no text in {folder} is left after {pattern!r}")
    return sorted(found)


def check_globs(folder: Path, globs: Iterable[str]) -> None:
    """Raise BadRecipe, naming all of them, if globs match no file of `folder`."""
    if not folder.is_dir():
        raise BadRecipe(f"there is no folder {folder}: `nr-serve fetch-corpus` makes one")
    idle = [glob for glob in globs if not glob.startswith(NOT) and not match_files(folder, glob)]
    if idle:
        named = ", ".join(map(repr, idle))
        raise BadRecipe(f"no text in {folder} matches {named}: `nr-serve fetch-corpus` puts text there")


def _spread(count: int) -> list[int]:
    """The numbers below `count` in order, but where they are too many, first `OPEN_SOURCES` of an even spread."""
    if count <= OPEN_SOURCES:
        return list(range(count))
    return sorted(range(count), key=lambda i: i * OPEN_SOURCES % count)


def read_in_turn(sources: Sequence[Source], characters: int | None = None, end: str = "") -> list[str]:
    """Documents, ordered by source: all, or about the first `characters` characters, one document of each in turn.

    At most `OPEN_SOURCES` are read at once. Of more of them, an even spread over the list comes first, and the rest
    as those end: with a limit, perhaps never. `end` is put after each document.

    Raises BadRecipe for a source without text.
    """
    read: list[list[str]] = [[] for _ in sources]
    waiting = ((i, sources[i]) for i in _spread(len(sources)))
    reading: dict[int, Iterator[str]] = {}
    taken = 0
    while characters is None or taken < characters:
        while len(reading) < OPEN_SOURCES and (following := next(waiting, None)) is not None:
            reading[following[0]] = following[1].documents(end)
        if not reading:
            break
        for i, stream in list(reading.items()):
            document = next(stream, None)
            if document is not None:
                read[i].append(document)
                taken += len(document)
                continue
            del reading[i]
            if not read[i]:
                raise BadRecipe(f"{sources[i]} holds no text")
    return [document for documents in read for document in documents]
