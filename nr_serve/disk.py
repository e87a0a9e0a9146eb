"""Files: the cache folder, and safe writing where other processes write too or the disk may be full. Torch-free."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from errno import EINVAL, EISDIR, ELOOP
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from nr_serve.errors import BadRequest, Conflict, NrError

WRITE_FAULTS = ("inline_container", "PytorchStreamWriter", "iostream error")
"""Texts that identify a RuntimeError of torch's file writer, which has no type of its own."""


def cache_folder() -> Path:
    """Return the folder for what can be fetched or made again.

    `$NR_CACHE`, else `$XDG_CACHE_HOME/nr-serve`, else `~/.cache/nr-serve`.
    """
    named = os.environ.get("NR_CACHE")
    if named:
        return Path(named).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says that a relative path must be ignored.
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "nr-serve"


class CannotWrite(NrError):
    """A file could not be written: no space, or no permission."""


def is_write_fault(error: Exception) -> bool:
    """Whether the error is one of the three kinds that a full disk can cause."""
    if isinstance(error, RuntimeError):
        return any(fault in str(error) for fault in WRITE_FAULTS)
    return isinstance(error, OSError | SafetensorError)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise errors of writing `path` inside the block as CannotWrite."""
    try:
        yield
    except Exception as error:
        if not is_write_fault(error):
            raise
        raise CannotWrite(f"cannot write {path}: {error}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end of the block the file there replaces `path`.

    If the block fails, the temporary file is removed. A reader sees the old file or the new one, even if others
    write it too. If `path` is a link, its target is replaced. Raises OSError if `path` exists and is not a file,
    such as a device.
    """
    path = _target(path)
    part = path.with_name(f".{uuid4().hex}.part")  # not made from the name, which may be as long as allowed
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, doing: str) -> Iterator[None]:
    """Lock a folder against other processes. Raises Conflict if one has locked it; a killed one frees it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"another process {doing} {folder}: wait until it ends") from error
        yield
    finally:
        os.close(handle)


def check_file(path: Path) -> None:
    """Raise BadRequest if this file could not be written, so that it is reported before hours of work."""
    with refused(f"cannot write {path}"):
        _try(_target(path).parent)


def check_output(path: Path, used: Iterable[Path]) -> None:
    """`check_file`; raise BadRequest, too, for one of the files that the command reads or writes otherwise."""
    if os.path.realpath(path) in map(os.path.realpath, used):
        raise BadRequest(f"cannot write {path}: this command uses that file already")
    check_file(path)


def make_folder(folder: Path) -> None:
    """Make a folder for files. Raises BadRequest if nothing can be written in it."""
    with refused(f"cannot write in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        _try(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all. Raises BadRequest."""
    with refused(f"cannot write {path}"), whole(path) as part:
        part.write_text(text, encoding="utf-8")


def _target(path: Path) -> Path:
    """The path with links resolved. Raises OSError for something that exists and is not a file."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise OSError(EISDIR, os.strerror(EISDIR), str(path))
    if target.is_symlink():
        raise OSError(ELOOP, os.strerror(ELOOP), str(path))
    check_ends(target)  # replacing a device would remove it for the whole machine
    return target


def check_ends(path: Path) -> None:
    """Raise OSError for a device or a pipe, which may have no end and cannot be read twice."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(EINVAL, "it is a device or a pipe", str(path))


def _try(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Raise an OSError inside the block as BadRequest, with `what` in front of the reason."""
    try:
        yield
    except OSError as error:
        raise BadRequest(f"{what}: {error.strerror or error}") from error
