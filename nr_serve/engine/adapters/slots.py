"""The slots: names, weights, attachments and counted gates change hands together. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nr_serve.engine.adapters.gate_counts import GateCounts
from nr_serve.engine.cache.neutrality import Attachments
from nr_serve.neutral.registry import Registry, Selection, Version

if TYPE_CHECKING:
    from nr_serve.neutral.bank import Bank


class Slots:
    """Owns who is in which slot of the bank, and what goes with it.

    What was counted in a slot belongs to whoever leaves it, so the counts are read before anybody can leave. And a
    slot that came free is shut at once.
    """

    def __init__(self, bank: Bank) -> None:
        self.registry = Registry(bank.slots)
        self.attachments = Attachments()
        self.counts = GateCounts(bank, self.registry)
        self._bank = bank

    @property
    def full(self) -> bool:
        """Whether every slot holds or receives a version."""
        return self.registry.slots_used == self.registry.slots

    def place(self, version: Version, slot: int) -> Iterator[None]:
        """Give the version a slot that `find_slot` found; its weights are there once the iterator is exhausted.

        It stays shut even then, until `open`: what is measured may be refused, and must not be observed meanwhile.
        """
        self.counts.read()
        self.registry.place(version, slot)
        self._shut([slot])
        return self._bank.attach(slot, version.payload, math.inf)

    def open(self, version: Version) -> int:
        """What is in the version's slot acts, at its threshold, from the next step on: a new attachment."""
        assert version.slot is not None
        self._bank.set_threshold(version.slot, version.threshold)
        return self.attachments.put(version.slot)

    def attach(self, version: Version) -> None:
        """Note that its slot holds all of the version; it goes at once if it was retired meanwhile."""
        self._shut(self.registry.attach(version))

    def displace(self, version: Version) -> None:
        """Take back the slot, if it has one, of a version that will not be published."""
        self._shut(self.registry.displace(version))

    def publish(self, version: Version) -> None:
        """From now on the version is what its name means."""
        self.counts.read()
        self._shut(self.registry.publish(version))

    def remove(self, name: str) -> None:
        """Unload a name, and what was counted of it. Raises NotFound."""
        self.counts.read()
        self._shut(self.registry.remove(name))
        self.counts.forget(name)

    def release(self, selection: Selection) -> None:
        """A request stops using these versions."""
        self._read_retired(selection)
        self._shut(self.registry.release(selection))

    def let_go(self, version: Version) -> None:
        """A change of the version has ended, for which it was kept in its slot."""
        self._read_retired((version,))
        self._shut(self.registry.let_go(version))

    def _read_retired(self, selection: Selection) -> None:
        if any(version.retired for version in selection):  # no other leaves: steps are not held up for nothing
            self.counts.read()

    def _shut(self, slots: list[int]) -> None:
        for slot in slots:
            self._bank.detach(slot)
            self.attachments.remove(slot)
