"""What an entry of a recipe's [data] names: a glob of files `<lang>.<source>...`, or a data set. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

DATASETS = "datasets:"
"""Prefix of a data set, `datasets:NAME[:CONFIG][@SPLIT]`; other entries are globs of files."""


NOT = "!"
"""Prefix of a glob that removes files matched by the entries before it."""


def names_source(entries: Iterable[str], source: str) -> bool:
    """Whether entries name a source such as `hu.lohelp`, by its name or by its training file's name."""
    return _names(entries, lambda glob: _is_source(glob, source), _takes_training)


def names_text(entries: Iterable[str], text: str) -> bool:
    """Whether entries name just this text: a file, by its name, or a data set, written `datasets:...@SPLIT`."""
    return _names(entries, lambda glob: _is_text(glob, text))


def names_language(entries: Iterable[str], language: str) -> bool:
    """Whether entries name text in a language; a data set is a language of its own."""
    return _names(
        entries, lambda glob: _is_language(glob, language), lambda glob: _is_whole(glob) and _takes_training(glob)
    )


def language_of(source: str) -> str:
    """`hu` for `hu.lohelp`; a data set's name does not tell its language, so the name itself is returned."""
    return source if "/" in source or ":" in source else source.split(".")[0]


def is_heldout(glob: str) -> bool:
    """Whether a glob, or a path, is of held-out files, which nothing trains on."""
    return "heldout" in _file(glob).split(".")[2:]


def _names(
    entries: Iterable[str], matches: Callable[[str], bool], removes: Callable[[str], bool] = lambda glob: True
) -> bool:
    """Whether the last entry whose glob matches names. Of those that remove, only the ones in `removes` count."""
    named = False
    for entry in entries:
        glob = entry.removeprefix(NOT)
        if matches(glob) and (glob == entry or removes(glob)):
            named = glob == entry
    return named


def _takes_training(glob: str) -> bool:
    """Whether removing what matches leaves nothing of a source to train on.

    `hu.a.*` takes its training file, and `hu.a.jsonl` its only one; `hu.a.heldout.txt` and `hu.a.dirty.txt` do not.
    """
    parts = _file(glob).removesuffix(".gz").removesuffix(".xz").split(".")
    if len(parts) == 3 and not fnmatchcase("heldout", parts[2]):
        return True
    return len(parts) < 3 or fnmatchcase("train", parts[2])


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
    return _file(glob).split(".")[1:2] in ([], ["*"])


def _file(pattern: str) -> str:
    return pattern.rsplit("/", 1)[-1]


def _is_dataset(source: str, entry: str) -> bool:
    """Whether `source` is the entry's data set; a folder may be a name in one and a path in the other."""
    name = entry.removeprefix(DATASETS).split("@")[0]
    return source == name or source.endswith(f"/{name}")
