"""What an entry of a recipe's [data] names: a glob of files `<lang>.<source>...`, or a data set. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

DATASETS = "datasets:"
"""Prefix of a data set, `datasets:NAME[:CONFIG][@SPLIT]`; other entries are globs of files."""


NOT = "!"
"""Prefix of a glob that removes files matched by the entries before it."""


def names_source(entries: Iterable[str], source: str) -> bool:
    """Whether entries name a source such as `hu.lohelp`, by its name or by its training file's name."""
    return _names(entries, lambda glob: _is_source(glob, source))


def names_text(entries: Iterable[str], text: str) -> bool:
    """Whether entries name just this text: a file, by its name, or a data set, written `datasets:...@SPLIT`."""
    return _names(entries, lambda glob: _is_text(glob, text))


def names_language(entries: Iterable[str], language: str) -> bool:
    """Whether entries name text in a language; a data set is a language of its own."""
    named = False
    for glob, named_here in _globs(entries):
        if _is_language(glob, language) and (named_here or _is_whole(glob)):
            named = named_here
    return named


def language_of(source: str) -> str:
    """`hu` for `hu.lohelp`; a data set's name does not tell its language, so the name itself is returned."""
    return source if "/" in source else source.split(".")[0]


def is_heldout(glob: str) -> bool:
    """Whether a glob, or a path, is of held-out files, which nothing trains on."""
    return "heldout" in _file(glob).split(".")[2:]


def _names(entries: Iterable[str], matches: Callable[[str], bool]) -> bool:
    """Whether the last entry whose glob matches names, and does not remove."""
    named = False
    for glob, named_here in _globs(entries):
        if matches(glob):
            named = named_here
    return named


def _globs(entries: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each glob or data set, and whether it is named (else removed); removed held-out files are skipped."""
    for entry in entries:
        glob = entry.removeprefix(NOT)
        if glob == entry or not is_heldout(glob):
            yield glob, glob == entry


def _is_source(entry: str, source: str) -> bool:
    if entry.startswith(DATASETS):
        return _is_dataset(source, entry)
    file = _file(entry)
    return fnmatchcase(source, ".".join(file.split(".")[:2])) or fnmatchcase(f"{source}.train.txt", file)


def _is_text(entry: str, text: str) -> bool:
    if entry.startswith(DATASETS) or text.startswith(DATASETS):
        return text in (entry, f"{entry}@train")
    return fnmatchcase(text, _file(entry))


def _is_language(entry: str, language: str) -> bool:
    if entry.startswith(DATASETS):
        return _is_dataset(language, entry)
    return fnmatchcase(language, _file(entry).split(".")[0])


def _is_whole(glob: str) -> bool:
    """Whether a glob names all sources of its languages."""
    return _file(glob).split(".")[1:2] == ["*"]


def _file(pattern: str) -> str:
    return pattern.rsplit("/", 1)[-1]


def _is_dataset(source: str, entry: str) -> bool:
    """Whether `source` is the entry's data set; a folder may be a name in one and a path in the other."""
    name = entry.removeprefix(DATASETS).split("@")[0]
    return source == name or source.endswith(f"/{name}")
