"""The bar that counts documents while `fetch-corpus` works."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def counted(items: Iterable[Item], what: str) -> Iterator[Item]:
    """The same items, counted by a bar where stderr is a terminal."""
    yield from tqdm(items, desc=f"corpus: {what}", unit=" documents", leave=False, disable=None)
