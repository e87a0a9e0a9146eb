"""The neutrality rule: which selections some computed tokens may serve. Torch-free.

It is a matter of *attachments*: an attachment is one version in one slot with one threshold. Whatever changes one
of the three makes a new attachment, and what was computed beside the old one does not know the new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nr_serve.engine.adapters.registry import Selection

NONE: frozenset[int] = frozenset()


class Attachments:
    """Which attachment is in which slot now. They are numbers, never used twice."""

    def __init__(self) -> None:
        self._numbers = count()
        self._in_slot: dict[int, int] = {}
        self.all: frozenset[int] = NONE

    def __getitem__(self, slot: int) -> int:
        return self._in_slot[slot]

    def put(self, slot: int) -> int:
        """From the next step on another version, or another threshold, acts in the slot: a new attachment."""
        number = self._in_slot[slot] = next(self._numbers)
        self.all = frozenset(self._in_slot.values())
        return number

    def remove(self, slot: int) -> None:
        """Nothing acts in the slot any more."""
        self._in_slot.pop(slot, None)
        self.all = frozenset(self._in_slot.values())

    def of(self, selection: Selection) -> frozenset[int]:
        """The attachments of attached versions."""
        return frozenset(self._in_slot[v.slot] for v in selection if v.slot is not None)


class Opened(NamedTuple):
    """The slots whose gate opened, in any layer, on some tokens."""

    acted: frozenset[int] = NONE
    """Those selected: their residues were added."""
    would_act: frozenset[int] = NONE
    """The others: nothing was added."""


NOTHING = Opened()


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the gates did from the first token of a sequence to some later one."""

    attached: frozenset[int]
    """Attachments whose gates were evaluated on all the tokens."""
    acted: frozenset[int] = NONE
    """Those that were selected and whose gate opened somewhere."""
    would_act: frozenset[int] = NONE
    """Those that were not selected and whose gate opened somewhere."""

    def serves(self, selection: frozenset[int]) -> bool:
        """The neutrality rule: whether the tokens' keys, values and carried states are exact under a selection.

        By induction over tokens and layers, the stream under `selection` is the one that was computed: all its
        gates were evaluated on that stream, so they open where they opened; those not selected then did not open,
        and those selected then but not now added nothing. So the same residues are added, and no others.
        """
        return self.acted <= selection <= self.attached and self.would_act.isdisjoint(selection)

    @property
    def serves_some(self) -> bool:
        """Whether there can be a selection that it serves."""
        return self.acted <= self.attached

    def then(self, attached: frozenset[int], acted: frozenset[int], would_act: frozenset[int]) -> Footprint:
        """Extended by some tokens."""
        if self.attached <= attached and acted <= self.acted and would_act <= self.would_act:
            return self
        return Footprint(self.attached & attached, self.acted | acted, self.would_act | would_act)
