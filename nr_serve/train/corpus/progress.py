"""What `fetch-corpus` says on stderr while it works."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def say(message: str) -> None:
    """A line."""
    print(f"corpus: {message}", file=sys.stderr, flush=True)


def counted(items: Iterable[Item], what: str) -> Iterator[Item]:
    """The same items, counted by a bar where stderr is a terminal."""
    yield from tqdm(items, desc=f"corpus: {what}", unit=" documents", leave=False, disable=None)
