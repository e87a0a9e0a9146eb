"""Writing where others may write, or where there may be no room. Torch-free."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from nr_serve.errors import Conflict, NrError

WRITE_FAULTS = ("inline_container", "PytorchStreamWriter", "iostream error")
"""One of these is in the text of each RuntimeError of torch's file writer, which has no type of its own."""


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
