"""Files: where they are kept, and writing where others may write or where there may be no room. Torch-free."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EINVAL, EISDIR, ELOOP
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

    So a reader sees the old file or the new one, whoever else writes it too. Where `path` is a link, what it leads
    to is replaced. Raises OSError for what is there and is no file, such as a device.
    """
    path = _target(path)
    part = path.with_name(f".{uuid4().hex}.part")  # without the name, which may be as long as names can be
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
    with refused(f"cannot write {path}"):
        _try(_target(path).parent)


def make_folder(folder: Path) -> None:
    """Make a folder for files. Raises BadRequest if it takes none."""
    with refused(f"cannot write in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        _try(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises BadRequest."""
    with refused(f"cannot write {path}"), whole(path) as part:
        part.write_text(text, encoding="utf-8")


def _target(path: Path) -> Path:
    """Where a file of that path is, links followed. Raises OSError for what is there and is no file."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise OSError(EISDIR, os.strerror(EISDIR), str(path))
    if target.is_symlink():
        raise OSError(ELOOP, os.strerror(ELOOP), str(path))
    check_ends(target)  # and to replace one would take it from the whole machine
    return target


def check_ends(path: Path) -> None:
    """Raise OSError for a device or a pipe: it may have no end, and cannot be read twice."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(EINVAL, "it is a device or a pipe", str(path))


def _try(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Raise an OSError inside as BadRequest, which begins with `what` could not be done."""
    try:
        yield
    except OSError as error:
        raise BadRequest(f"{what}: {error.strerror or error}") from error
