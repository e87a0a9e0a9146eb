"""Packed text kept in a folder, so that text is tokenised once: a file each, whole or not there.

A file's name is a hash of everything its content depends on, so a changed source, tokenizer or setting is another
file. When the folder grows over a bound, the files that were used longest ago go.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from nr_serve.default_model import cache_folder
from nr_serve.train.pack import Packed, Windows

FORMAT = 1
"""Raised when packing changes: files of another format are never read again."""

MOST_BYTES = 8 * 2**30
TORN_AFTER_S = 24 * 3600
"""A temporary file this old was left by a killed process."""


class TokenCache:
    """The folder; `$NR_CACHE/tokens` or `~/.cache/nr-serve/tokens` unless one is named."""

    def __init__(self, folder: Path | None = None, most_bytes: int = MOST_BYTES) -> None:
        self.folder = folder if folder is not None else cache_folder() / "tokens"
        self.most_bytes = most_bytes

    def packed(self, key: Sequence[Any], make: Callable[[], Packed]) -> Packed:
        """What `make` returns, read from the folder if it was made before under `key` (plain values).

        A file that is damaged is made again. A folder that cannot be written costs time, so that is said.
        """
        name = hashlib.sha256(json.dumps([FORMAT, *key]).encode()).hexdigest()[:32]
        path = self.folder / f"{name}.safetensors"
        found = self._read(path)
        if found is not None:
            return found
        made = make()
        try:
            self._write(path, made)
        except OSError as error:
            _say(f"cannot keep tokens in {self.folder}: {error}")
        return made

    def _read(self, path: Path) -> Packed | None:
        try:
            with safe_open(path, framework="pt") as file:
                digest = (file.metadata() or {}).get("digest")
                parts = {name: file.get_tensor(name) for name in ("ids", "offset", "grams")}
            if digest != _digest(parts):
                raise ValueError("its content is not what was written")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            _say(f"{path} is damaged and made again: {error}")
            return None
        with suppress(PermissionError):  # another user's: read all the same, only not marked as used
            os.utime(path)
        return Packed(Windows(parts["ids"].long(), parts["offset"].long()), parts["grams"])

    def _write(self, path: Path, packed: Packed) -> None:
        windows = packed.windows
        parts = {"ids": windows.ids_NT.int(), "offset": windows.offset_NT.int(), "grams": packed.grams}
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".part", dir=self.folder)
        os.close(handle)
        part = Path(name)
        try:
            safetensors.torch.save_file(parts, part, {"digest": _digest(parts)})
            part.chmod(0o644)  # a temporary file is for the owner alone; a cache may be shared
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
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


def tokenizer_key(tokenizer: Any) -> str:
    """Hash of all that decides a tokenizer's ids: its saved files, chat template included."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        for path in sorted(Path(name).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(name)} {path.stat().st_size} ".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _digest(parts: dict[str, torch.Tensor]) -> str:
    """Hash of shapes and content: a crash of the machine can leave a file of the right size, full of zeros."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name} {list(parts[name].shape)} ".encode())
        digest.update(parts[name].reshape(-1).numpy().data)
    return digest.hexdigest()


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


def _say(message: str) -> None:
    print(f"tokens: {message}", file=sys.stderr, flush=True)
