"""Packed text kept in a folder, so that text is tokenised once."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from nr_serve.disk import CannotWrite, cache_folder
from nr_serve.errors import raised_as
from nr_serve.train.file_cache import MOST_BYTES, FileCache
from nr_serve.train.text.pack import Packed, Windows

FORMAT = 6
"""Increased when packing changes, so that files of another format are never read."""


class TokenCache:
    """The cache's folder: `tokens` in the cache folder, unless another is given."""

    def __init__(self, folder: Path | None = None, most_bytes: int = MOST_BYTES) -> None:
        self.folder = folder if folder is not None else cache_folder() / "tokens"
        self._cache = FileCache(self.folder, most_bytes)

    def packed(self, key: Sequence[Any], make: Callable[[], Packed]) -> Packed:
        """The result of `make`, read from the folder if it was made before under `key` (plain values)."""
        return self._cache.get([FORMAT, *key], make, _dump, _load)


def _dump(packed: Packed) -> bytes:
    windows = packed.windows
    return save({"ids": windows.ids_NT.int(), "offset": windows.offset_NT.int(), "grams": packed.grams})


def _load(content: bytes) -> Packed:
    parts = load(content)
    return Packed(Windows(parts["ids"].long(), parts["offset"].long()), parts["grams"])


def tokenizer_key(tokenizer: Any) -> str:
    """Hash of all that a tokenizer's ids depend on: its saved files, with the chat template. Raises CannotWrite."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as name:
        with raised_as(CannotWrite, f"cannot write the tokenizer to the temporary folder {name}"):
            tokenizer.save_pretrained(name)
        for path in sorted(Path(name).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(name)} {path.stat().st_size} ".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
