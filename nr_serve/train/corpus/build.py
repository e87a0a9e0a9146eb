"""`fetch-corpus`: from a recipe to files of training and held-out text."""

from __future__ import annotations

import csv
import lzma
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nr_serve.disk import held, writing
from nr_serve.errors import BadRequest, DownloadFailed, NrError
from nr_serve.logs import say
from nr_serve.train.corpus.clean import clean_document
from nr_serve.train.corpus.extract import extract
from nr_serve.train.corpus.files import (
    Manifest,
    read_documents,
    read_manifest,
    text_file,
    write_documents,
    write_manifest,
)
from nr_serve.train.corpus.folder import check_folder, folder_files, folder_versions
from nr_serve.train.corpus.packages import Packages
from nr_serve.train.corpus.recipe import Source, read_recipe
from nr_serve.train.corpus.split import Document, deduplicate, drop_leaked, hold_out, shared_grams, size, thin
from nr_serve.train.documents import pieces
from nr_serve.train.globs import match_files

PARTS = ("train", "heldout")
_DAMAGED = (
    NrError,
    ValueError,
    LookupError,
    OSError,
    RecursionError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    csv.Error,
    struct.error,
)
"""Errors that unpacking and reading a damaged package may raise."""
WORK = ".packages-"  # prefix of the folders in which packages are unpacked
RAW_FACTOR = 4  # characters searched for repetitions per character kept, at most


@dataclass(frozen=True)
class Fetched:
    """One source on disk: its two files, and the number of characters in each."""

    name: str
    train: Path
    heldout: Path
    train_chars: int
    heldout_chars: int


def fetch_corpus(recipe: Path, out: Path, only: Sequence[str] = ()) -> list[Fetched]:
    """Fetch the sources of `recipe` into the folder `out`, and return all of them as they are on disk then.

    Writes `NAME.train.txt` and `NAME.heldout.txt` for each source: UTF-8, one paragraph per line, an empty line
    between documents. Also writes `manifest.json` with versions, licences and amounts. `only` selects sources by
    name or pattern ("hu.*"). Sources that are already there from the same recipe stay as they are, unless they are
    the user's own files and have changed; what was training text then stays training text, and what was held out
    stays held out. `out` may also contain text of other recipes.

    Raises `DownloadFailed` naming every source that failed, after writing the others; `BadRequest` if a pattern of
    `only` matches none or a folder is absent; `Conflict` if another process fetches into `out`; `CannotWrite`.
    """
    sources = read_recipe(recipe)
    unmatched = [pattern for pattern in only if not any(fnmatchcase(s.name, pattern) for s in sources)]
    if unmatched:
        raise BadRequest(f"corpus recipe {recipe} has no source that matches {', '.join(unmatched)}")
    sources = [s for s in sources if not only or any(fnmatchcase(s.name, pattern) for pattern in only)]
    for source in sources:
        if source.kind == "folder":
            check_folder(source, recipe.parent, out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with held(out, "fetches into"):
            for left in out.glob(f"{WORK}*"):  # left by a killed process
                shutil.rmtree(left)
            return _fetch(sources, recipe.parent, out)


def _fetch(sources: list[Source], beside: Path, out: Path) -> list[Fetched]:
    manifest = read_manifest(out)
    missing = [source for source in sources if not _is_there(source, beside, manifest, out)]
    failures = _fetch_all(missing, beside, out, manifest) if missing else []
    for language in sorted({source.language for source in sources}):
        _compare_sources(language, out, manifest)
    if failures:
        raise DownloadFailed("\n".join([f"{len(failures)} of {len(sources)} sources failed:", *failures]))
    return [_fetched(source.name, manifest[source.name], out) for source in sources]


def _fetch_all(sources: list[Source], beside: Path, out: Path, manifest: Manifest) -> list[str]:
    """Fetch each source, write the manifest after each, and return the failures, one line per source.

    The user's own folders are relative to `beside`.
    """
    failures = []
    languages = sorted({source.language for source in sources if source.kind == "ddtp"})
    with tempfile.TemporaryDirectory(prefix=WORK, dir=out) as work:
        builder = Builder(Packages(Path(work).resolve(), languages), beside)
        for number, source in enumerate(sources, 1):
            say("corpus", f"[{number}/{len(sources)}] {source.name}")
            try:
                manifest[source.name] = builder.build(source, out)
            except _DAMAGED as error:
                # One bad package must not lose the others; every failure is reported at the end.
                failures.append(f"{source.name}: {error}")
                say("corpus", f"{source.name} failed: {error}")
            else:
                write_manifest(out, manifest)
    return failures


def _compare_sources(language: str, out: Path, manifest: Manifest) -> None:
    """Drop held-out text that is in the training text of any source of the language.

    For example, a program's messages are in its manual too. Each manifest entry lists the sources that it was
    compared with, so that this is repeated only when a source was added.
    """
    own = (name for name in manifest if name.startswith(f"{language}."))
    names = sorted(name for name in own if all(text_file(out, name, part).is_file() for part in PARTS))
    if all(manifest[name].get("compared") == names for name in names):
        return
    say("corpus", f"comparing held-out text with training text: {', '.join(names)}")
    held = {name: list(read_documents(text_file(out, name, "heldout"))) for name in names}
    train = chain.from_iterable(read_documents(text_file(out, name, "train")) for name in names)
    shared = shared_grams(chain.from_iterable(held.values()), train)
    for name in names:
        kept = drop_leaked(held[name], shared)
        write_documents(text_file(out, name, "heldout"), kept)
        manifest[name] |= {"heldout_chars": size(kept), "compared": names}
    write_manifest(out, manifest)


def _before(out: Path, name: str) -> tuple[set[str], set[str]]:
    """The paragraphs that a source's two files hold; none if one of the files is missing."""
    files = [text_file(out, name, part) for part in PARTS]
    if not all(file.is_file() for file in files):
        return set(), set()
    train, heldout = (set(chain.from_iterable(read_documents(file))) for file in files)
    return train, heldout


class Builder:
    """Makes the text of one source after another, from shared packages, or from folders relative to `beside`."""

    def __init__(self, packages: Packages, beside: Path) -> None:
        self._packages, self._beside = packages, beside
        self._originals: dict[str, frozenset[str]] = {}

    def build(self, source: Source, out: Path) -> dict[str, Any]:
        """Write the two files of `source` into `out` and return its entry in the manifest."""
        files = self._files(source, source.files)
        trained, measured = _before(out, source.name)
        documents = self._documents(source, files, trained | measured)
        train, heldout = hold_out(documents, trained, measured)
        if not documents:
            raise DownloadFailed(f"no text left of {len(files)} files")
        if not train or not heldout:
            raise DownloadFailed(_too_few(documents))
        write_documents(text_file(out, source.name, "train"), train)
        write_documents(text_file(out, source.name, "heldout"), heldout)
        amounts = {"train_chars": size(train), "heldout_chars": size(heldout)}
        say("corpus", f"{source.name}: {size(train) / 1e6:.2f} + {size(heldout) / 1e6:.3f} million characters kept")
        return {
            **amounts,
            "licence": source.licence,
            "versions": self._versions(source),
            "source": source.model_dump(mode="json"),
        }

    def _documents(self, source: Source, files: list[Path], known: set[str]) -> list[Document]:
        """The source's documents, cleaned; if there are too many, first those with paragraphs that are `known`."""
        originals = self._original_paragraphs(source)
        translated = re.split("[_-]", source.language)[0] != "en"
        say("corpus", f"{source.name}: files to read: {len(files):,}")
        read, cleaned = 0, []
        for document in tqdm(
            _raw_documents(files, source),
            desc=f"corpus: {source.name}",
            unit=" documents",
            leave=False,
            disable=None,  # disabled unless on a terminal
        ):
            read += size([document])
            prose = clean_document(document, translated=translated, originals=originals)
            if prose:
                cleaned.append(prose)
        limit = source.limit_mb * 1e6
        bounded = thin(cleaned, RAW_FACTOR * limit, known)
        # Cut into pieces, so that a share can be held out of a source with few long documents.
        parts = [part for document in deduplicate(bounded) for part in pieces(document)]
        found = f"{size(cleaned) / 1e6:.2f} are prose in its language, {size(parts) / 1e6:.2f} but for repetitions"
        say("corpus", f"{source.name}: of {read / 1e6:.2f} million characters {found}")
        return thin(parts, limit, known)

    def _original_paragraphs(self, source: Source) -> frozenset[str]:
        key = source.model_dump_json(exclude={"name", "language", "files", "licence"})
        if key not in self._originals:
            raw = _raw_documents(self._files(source, source.original), source) if source.original else iter(())
            empty: frozenset[str] = frozenset()
            english = (clean_document(document, translated=False, originals=empty) for document in raw)
            self._originals[key] = frozenset(paragraph for document in english for paragraph in document)
        return self._originals[key]

    def _files(self, source: Source, globs: Sequence[str]) -> list[Path]:
        """The files to read, in an order that depends only on their names."""
        if source.kind == "ddtp":
            return self._packages.descriptions(source.language)
        if source.kind == "folder":
            return folder_files(source, self._beside, globs)
        fetch = self._packages.deb if source.kind == "deb" else self._packages.pypi
        found: dict[str, Path] = {}
        for root in [fetch(package) for package in source.packages]:
            for glob in globs:
                # Links in packages point to the same text again, or to packages that are not there.
                matches = match_files(root, glob)
                found |= {str(path.relative_to(root)): path for path in matches if not path.is_symlink()}
        if not found:
            raise DownloadFailed(f"{', '.join(source.packages)} holds no {' or '.join(globs)}")
        return [found[name] for name in sorted(found)]

    def _versions(self, source: Source) -> dict[str, str]:
        if source.kind == "ddtp":
            files = self._packages.descriptions(source.language)
            return {path.name: self._packages.versions[path.name] for path in files}
        if source.kind == "folder":
            return folder_versions(source, self._beside)
        names = [package.partition("==")[0] for package in source.packages]
        return {name: self._packages.versions[name] for name in names}


def _too_few(documents: list[Document]) -> str:
    paragraphs = sum(map(len, documents))
    found = f"{size(documents):,} characters of text, in paragraphs: {paragraphs}"
    return f"{found}: too few to hold some out, for a paragraph is not split"


def _raw_documents(files: list[Path], source: Source) -> Iterator[Document]:
    strip = re.compile(source.strip) if source.strip else None
    for path in files:
        for document in extract(path, source):
            yield [strip.sub("", paragraph) for paragraph in document] if strip else document


def _is_there(source: Source, beside: Path, manifest: Manifest, out: Path) -> bool:
    entry = manifest.get(source.name)
    if entry is None or not all(text_file(out, source.name, part).is_file() for part in PARTS):
        return False
    unchanged = source.kind != "folder" or entry.get("versions") == folder_versions(source, beside)
    return unchanged and source.is_same(entry.get("source", {}))


def _fetched(name: str, entry: dict[str, Any], out: Path) -> Fetched:
    train, heldout = (text_file(out, name, part) for part in PARTS)
    return Fetched(name, train, heldout, entry["train_chars"], entry["heldout_chars"])
