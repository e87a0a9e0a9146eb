"""Tensors kept in a folder under a key, so that what is slow to make is made once: a file each, whole or not there.

A file's name is a hash of its key, which holds everything its content depends on. When the folder grows over a
bound, the files that were used longest ago go.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nr_serve.disk import whole
from nr_serve.logs import say

_say = partial(say, "cache")
MOST_BYTES = 8 * 2**30
TORN_AFTER_S = 24 * 3600
"""A temporary file this old was left by a killed process."""

Tensors = dict[str, Tensor]


class TensorCache:
    """A folder of tensors."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder = folder
        self.most_bytes = most_bytes

    def get(self, key: Sequence[Any], make: Callable[[], Tensors]) -> Tensors:
        """What `make` returns, read from the folder if it was made before under `key` (plain values).

        A file that is damaged is made again. A folder that cannot be written costs time, so that is said.
        """
        name = hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:32]
        path = self.folder / f"{name}.safetensors"
        found = self._read(path)
        if found is not None:
            return found
        made = make()
        try:
            self._write(path, made)
        except (OSError, SafetensorError) as error:
            _say(f"cannot keep anything in {self.folder}: {error}")
        return made

    def _read(self, path: Path) -> Tensors | None:
        try:
            with safe_open(path, framework="pt") as file:
                checksum = (file.metadata() or {}).get("digest")
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            if checksum != _checksum(parts):
                raise ValueError("its content is not what was written")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            _say(f"{path} is damaged and made again: {error}")
            return None
        with suppress(PermissionError):  # another user's: read all the same, only not marked as used
            os.utime(path)
        return parts

    def _write(self, path: Path, parts: Tensors) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            safetensors.torch.save_file(parts, part, {"digest": _checksum(parts)})
            part.chmod(0o644)  # the library leaves it readable by its owner alone; a cache may be shared
        self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        """Remove what was used longest ago until the folder fits its bound; never `newest`."""
        for torn in self.folder.glob(".*.part"):
            if _used(torn) < time.time() - TORN_AFTER_S:
                torn.unlink(missing_ok=True)
        files = sorted((path for path in self.folder.glob("*.safetensors") if path != newest), key=_used)
        total = newest.stat().st_size + sum(_size(path) for path in files)
        for path in files:
            if total <= self.most_bytes:
                return
            total -= _size(path)
            path.unlink(missing_ok=True)


def digest(tensors: Iterable[Tensor]) -> str:
    """Hash of the content of tensors on the CPU, one after another; a key that depends on shapes names them too."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(_content(tensor))
    return found.hexdigest()


def _checksum(parts: Tensors) -> str:
    """What tells a damaged file: a crash of the machine can leave one of the right size, full of zeros."""
    found = hashlib.sha256()
    for name in sorted(parts):
        found.update(f"{name} {list(parts[name].shape)} ".encode())
        found.update(_content(parts[name]))
    return found.hexdigest()


def _content(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).numpy().data


def _used(path: Path) -> float:
    """When a file was last read or written; long ago if another process has just removed it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
