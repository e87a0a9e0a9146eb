"""A cache of values in a folder, by key: one file per value, written completely or not at all.

A file's name is a hash of its key, which contains everything that the value depends on. When the folder exceeds
its bound, the least recently used files are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nr_serve.disk import whole
from nr_serve.logs import say

_say = partial(say, "cache")
MOST_BYTES = 8 * 2**30
TORN_AFTER_S = 24 * 3600
"""A temporary file older than this was left by a killed process."""

_Value = TypeVar("_Value")
_DIGEST = hashlib.sha256
_DIGEST_BYTES = _DIGEST().digest_size


class FileCache:
    """A folder of cached values."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder = folder
        self.most_bytes = most_bytes

    def get(
        self,
        key: Sequence[Any],
        make: Callable[[], _Value],
        dump: Callable[[_Value], bytes],
        load: Callable[[bytes], _Value],
    ) -> _Value:
        """The result of `make`, read from the folder if it was made before under `key` (plain values).

        `dump` and `load` convert a value to and from its file's bytes. A damaged file is made again. If the folder
        cannot be written, that is reported, because it costs time.
        """
        path = self.folder / _DIGEST(json.dumps(list(key)).encode()).hexdigest()[:32]
        found = self._read(path)
        if found is not None:
            return load(found)
        made = make()
        try:
            self._write(path, dump(made))
        except OSError as error:
            _say(f"cannot keep anything in {self.folder}: {error}")
        return made

    def _read(self, path: Path) -> bytes | None:
        try:
            kept = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _say(f"{path} cannot be read, and is made again: {error}")
            return None
        digest, content = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
        # A crash of the machine can leave a file of the right size that is full of zeros.
        if digest != _DIGEST(content).digest():
            _say(f"{path} is damaged, and is made again: its content is not what was written")
            return None
        with suppress(OSError):  # another user's file, or a read-only disk: it is just not marked as used
            os.utime(path)
        return content

    def _write(self, path: Path, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole(path) as part, part.open("wb") as file:
            file.write(_DIGEST(content).digest())
            file.write(content)
        self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        """Remove the least recently used files until the folder fits its bound; never `newest`."""
        for torn in self.folder.glob(".*.part"):
            if _used(torn) < time.time() - TORN_AFTER_S:
                torn.unlink(missing_ok=True)
        others = (path for path in self.folder.iterdir() if not path.name.startswith(".") and path != newest)
        files = sorted(others, key=_used)
        total = newest.stat().st_size + sum(_size(path) for path in files)
        for path in files:
            if total <= self.most_bytes:
                return
            total -= _size(path)
            path.unlink(missing_ok=True)


def _used(path: Path) -> float:
    """When a file was last read or written; 0 if another process has just removed it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
