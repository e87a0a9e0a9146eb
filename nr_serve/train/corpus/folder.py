"""The user's own text: files in a folder beside the corpus recipe, and a digest that shows if they changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from nr_serve.errors import BadRequest
from nr_serve.train.corpus.recipe import Source
from nr_serve.train.globs import match_files


def check_folder(source: Source, beside: Path, out: Path) -> None:
    """Raise `BadRequest` unless the source's folder (relative to `beside`) has files to read and lacks `out`."""
    root = beside / source.folder
    if not root.is_dir():
        raise BadRequest(f"source {source.name}: there is no folder {root}")
    if out.resolve().is_relative_to(root.resolve()):
        raise BadRequest(f"source {source.name}: the corpus folder {out} must not lie in {root}, which is read")
    folder_files(source, beside, source.files)


def folder_files(source: Source, beside: Path, globs: Sequence[str]) -> list[Path]:
    """The files of the folder that match, sorted by their relative paths; raises `BadRequest` if there are none."""
    root = beside / source.folder
    found = {path for glob in globs for path in match_files(root, glob)}
    if not found:
        raise BadRequest(f"source {source.name}: {root} holds no {' or '.join(globs)}")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def folder_versions(source: Source, beside: Path) -> dict[str, str]:
    """The folder's name, with a digest of the names, sizes and contents of the files read from it.

    Raises `BadRequest` for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for path in folder_files(source, beside, source.files + source.original):
        name = path.relative_to(beside / source.folder).as_posix()
        digest.update(f"{name}\0{_content(path)}\n".encode())
    return {source.folder: f"sha256:{digest.hexdigest()}"}


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return f"{path.stat().st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {error.strerror}") from error
