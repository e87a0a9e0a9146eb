"""The neutrality rule: which selections some computed tokens may serve. Torch-free.

The rule is about *attachments*. An attachment is one version in one slot with one threshold; changing any of the
three makes a new attachment. Tokens computed while the old one was attached say nothing about the new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nr_serve.engine.adapters.registry import Selection

NONE: frozenset[int] = frozenset()


class Attachments:
    """The attachment in each slot now. Attachments are numbers that are never used twice."""

    def __init__(self) -> None:
        self._numbers = count()
        self._in_slot: dict[int, int] = {}
        self.all: frozenset[int] = NONE

    def __getitem__(self, slot: int) -> int:
        return self._in_slot[slot]

    def put(self, slot: int) -> int:
        """Make a new attachment: from the next step on, another version or threshold acts in the slot."""
        number = self._in_slot[slot] = next(self._numbers)
        self.all = frozenset(self._in_slot.values())
        return number

    def remove(self, slot: int) -> None:
        """Note that nothing acts in the slot any more."""
        self._in_slot.pop(slot, None)
        self.all = frozenset(self._in_slot.values())

    def of(self, selection: Selection) -> frozenset[int]:
        """The attachments of those versions in the selection that have a slot."""
        return frozenset(self._in_slot[v.slot] for v in selection if v.slot is not None)


class Opened(NamedTuple):
    """The slots whose gate opened, in any layer, on some tokens."""

    acted: frozenset[int] = NONE
    """Slots that were selected: their residues were added."""
    would_act: frozenset[int] = NONE
    """Slots that were not selected: nothing was added."""


NOTHING = Opened()


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the gates did from a sequence's first token to some later one."""

    attached: frozenset[int]
    """Attachments whose gates were evaluated on all these tokens."""
    acted: frozenset[int] = NONE
    """Selected attachments whose gate opened on some token: their residues were added."""
    would_act: frozenset[int] = NONE
    """Attachments that were not selected and whose gate opened on some token."""

    def serves(self, selection: frozenset[int]) -> bool:
        """The neutrality rule: whether the tokens' keys, values and carried states are exact under a selection.

        By induction over tokens and layers, the stream under `selection` is the one that was computed: all gates
        of `selection` were evaluated on that stream, so they open where they opened. Attachments selected now but
        not then did not open; those selected then but not now added nothing. So the same residues are added.
        """
        return self.acted <= selection <= self.attached and self.would_act.isdisjoint(selection)

    @property
    def serves_some(self) -> bool:
        """Whether any selection can still be served."""
        return self.acted <= self.attached

    def then(self, attached: frozenset[int], acted: frozenset[int], would_act: frozenset[int]) -> Footprint:
        """The footprint extended by some tokens."""
        if self.attached <= attached and acted <= self.acted and would_act <= self.would_act:
            return self
        return Footprint(self.attached & attached, self.acted | acted, self.would_act | would_act)
