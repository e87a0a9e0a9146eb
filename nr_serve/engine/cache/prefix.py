"""The prefix cache: full pages by their tokens, as a tree. Torch-free.

A page is known by its tokens and by the page before it, so a match compares the tokens themselves: no two prefixes
can be taken for each other, whatever clients send.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nr_serve.engine.cache.neutrality import NONE, Footprint
from nr_serve.engine.cache.pages import PagePool

Key = tuple[str | None, bytes]
"""A page's tokens and, for a sequence's first page, its salt. Python's hash of bytes cannot be foreseen."""


@dataclass(eq=False, slots=True)
class Record:
    """A full page. Its parent is held by whoever holds it, and so is evicted after it."""

    page: int
    parent: Record | None
    key: Key
    footprint: Footprint
    """Of the tokens up to its end. It serves no selection that its parent does not serve."""
    selection: frozenset[int]
    """Under which it was computed."""
    children: dict[Key, list[Record]] = field(default_factory=dict)
    """The pages after it; several of one key differ in their footprints."""

    def forget(self) -> None:
        """The page is about to hold something else."""
        assert self.parent is not None
        assert not self.children
        siblings = self.parent.children[self.key]
        siblings.remove(self)
        if not siblings:
            del self.parent.children[self.key]


@dataclass(slots=True)
class Chain:
    """How far a running request's tokens are in the tree."""

    last: Record
    """Its last full page, or the root."""
    footprint: Footprint
    """Of all tokens it computed, those after the last full page included."""


class PrefixCache:
    """Owns the tree. Its pages are the pool's, which evicts those that nobody holds."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._root = Record(-1, None, (None, b""), Footprint(NONE), NONE)

    def match(self, tokens: Sequence[int], salt: str | None, selection: frozenset[int]) -> list[Record]:
        """The longest chain of pages with these tokens that is exact under the selection.

        At least one token is left over, for the next one is sampled from what the model says of the last.
        """
        size = self._pool.page_size
        reached = [self._root]
        for start in range(0, len(tokens) - size, size):
            key = _key(tokens[start : start + size], salt if start == 0 else None)
            further = [
                r for record in reached for r in record.children.get(key, ()) if r.footprint.serves(selection)
            ]
            if not further:
                break
            reached = further
        return _path(max(reached, key=lambda record: len(record.footprint.attached)))

    def begin(self, matched: Sequence[Record], attached: frozenset[int]) -> Chain:
        """The chain of a request that starts with the matched pages while so much is attached."""
        if not matched:
            return Chain(self._root, Footprint(attached))
        return Chain(matched[-1], matched[-1].footprint)

    def add(
        self, chain: Chain, tokens: Sequence[int], page: int, salt: str | None, selection: frozenset[int]
    ) -> int:
        """Put the chain's next page, which holds these tokens, into the tree.

        Returns the page to go on with, held: another one if the same was computed before.
        """
        key = _key(tokens, salt if chain.last is self._root else None)
        siblings = chain.last.children.setdefault(key, [])
        # The same tokens, attachments and openings: whatever was selected, the same was added to the stream.
        record = next((r for r in siblings if r.footprint == chain.footprint), None)
        if record is None:
            record = Record(page, chain.last, key, chain.footprint, selection)
            siblings.append(record)
            self._pool.keep(page, record)
        else:
            self._pool.share([record.page])
            self._pool.give_back([page])
        chain.last = record
        return record.page

    def records(self) -> Iterator[Record]:
        """Every record, parents first."""
        waiting = [self._root]
        while waiting:
            children = [r for records in waiting.pop().children.values() for r in records]
            yield from children
            waiting += children


def _key(tokens: Sequence[int], salt: str | None) -> Key:
    return salt, array("I", tokens).tobytes()


def _path(record: Record) -> list[Record]:
    """The records from the first page to this one."""
    path = []
    while record.parent is not None:
        path.append(record)
        record = record.parent
    return path[::-1]
