"""The tree of the prefix cache: full pages by their tokens. Torch-free.

A page is identified by its tokens and by the page before it. A match compares the tokens themselves, so no two
prefixes can be confused, whatever clients send.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nr_serve.engine.cache.neutrality import NONE, Footprint
from nr_serve.engine.cache.pages import PagePool

Key = tuple[str | None, bytes]
"""A page's tokens and, for a sequence's first page, its salt. Python randomises the hash of bytes."""


@dataclass(eq=False, slots=True)
class Record:
    """A full page. Whoever holds it holds its parent too, so the parent is evicted later."""

    page: int
    parent: Record | None
    key: Key
    footprint: Footprint
    """Footprint of all tokens up to the page's end. It serves no selection that the parent's does not serve."""
    selection: frozenset[int]
    """Attachments selected when the page was computed."""
    children: dict[Key, list[Record]] = field(default_factory=dict)
    """The pages that follow this one, by key; pages with the same key differ in their footprints."""

    def forget(self) -> None:
        """Remove the record from the tree: its page is about to hold something else."""
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
    """Record of the request's last full page, or the root."""
    footprint: Footprint
    """Footprint of all tokens computed so far, including those after the last full page."""


class PrefixTree:
    """Owns the tree of records. The pages belong to the pool, which evicts those that nobody holds."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._root = Record(-1, None, (None, b""), Footprint(NONE), NONE)

    def match(self, tokens: Sequence[int], salt: str | None, selection: frozenset[int]) -> list[Record]:
        """The longest chain of pages with these tokens that is exact under the selection.

        At least one token is left to compute, because the next token is sampled from the last token's logits.
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
        """A chain for a request that starts with the matched pages; `attached` are all attachments now."""
        if not matched:
            return Chain(self._root, Footprint(attached))
        return Chain(matched[-1], matched[-1].footprint)

    def add(
        self, chain: Chain, tokens: Sequence[int], page: int, salt: str | None, selection: frozenset[int]
    ) -> int:
        """Add the chain's next page, which holds these tokens, to the tree.

        Returns the page to use from now on, held by the request: another one if the same page was computed before.
        """
        key = _key(tokens, salt if chain.last is self._root else None)
        siblings = chain.last.children.setdefault(key, [])
        # Same tokens, attachments and opened gates: the same residues were added, whatever was selected.
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
    """The records from the sequence's first page to this one."""
    path = []
    while record.parent is not None:
        path.append(record)
        record = record.parent
    return path[::-1]
