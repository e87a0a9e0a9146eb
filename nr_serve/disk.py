"""Files: where they are kept, and writing where others may write or where there may be no room. Torch-free."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from nr_serve.errors import BadRequest, Conflict, NrError

WRITE_FAULTS = ("inline_container", "PytorchStreamWriter", "iostream error")
"""One of these is in the text of each RuntimeError of torch's file writer, which has no type of its own."""


def cache_folder() -> Path:
    """Return the folder for what can be fetched or made again.

    `$NR_CACHE`, else `$XDG_CACHE_HOME/nr-serve`, else `~/.cache/nr-serve`.
    """
    named = os.environ.get("NR_CACHE")
    if named:
        return Path(named).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # As the XDG specification has it, a relative path counts as none.
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "nr-serve"


class CannotWrite(NrError):
    """A file that could not be written: no space, or no right to."""


def is_write_fault(error: Exception) -> bool:
    """Whether this is one of the three ways in which a full disk shows."""
    if isinstance(error, RuntimeError):
        return any(fault in str(error) for fault in WRITE_FAULTS)
    return isinstance(error, OSError | SafetensorError)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise what keeps `path` from being written inside as CannotWrite."""
    try:
        yield
    except Exception as error:
        if not is_write_fault(error):
            raise
        raise CannotWrite(f"cannot write {path}: {error}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to inside: what is there at the end takes the place of `path`, else it goes.

    So a reader sees the old file or the new one, whoever else writes it too.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder against other processes. Raises Conflict if one holds it; a killed one lets go."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"another process {doing} {folder}") from error
        yield
    finally:
        os.close(handle)


def check_file(path: Path) -> None:
    """Raise BadRequest if this file could not be written: said before hours of work, not after."""
    with _refused(f"cannot write {path}"):
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        _try(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder for files. Raises BadRequest if it takes none."""
    with _refused(f"cannot write in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        _try(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file. Raises BadRequest."""
    with _refused(f"cannot write {path}"):
        path.write_text(text, encoding="utf-8")


def _try(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadRequest(f"{what}: {error.strerror}") from error
