"""The files that a measurement writes: a place that takes none is refused before anything is measured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path

from nr_serve.errors import BadRequest


def check_page(page: Path) -> None:
    """Raise BadRequest if this file could not be written."""
    with _refused(f"cannot write {page}"):
        if page.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        _try(page.parent)


def make_folder(folder: Path) -> None:
    """Make a folder for files. Raises BadRequest if it takes none."""
    with _refused(f"cannot write in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        _try(folder)


def write_page(page: Path, text: str) -> None:
    """Write a file. Raises BadRequest."""
    with _refused(f"cannot write {page}"):
        page.write_text(text, encoding="utf-8")


def _try(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadRequest(f"{what}: {error.strerror}") from error
