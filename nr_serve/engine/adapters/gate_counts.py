"""Gate statistics by adapter name: what the bank counts in its slots, summed over versions. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nr_serve.engine.messages import AdapterGates
from nr_serve.names import MOST_JOINED, OTHER

if TYPE_CHECKING:
    from nr_serve.engine.adapters.registry import Registry
    from nr_serve.neutral.bank import Bank

LAYER_GROUPS = 4  # layers are summed in a few groups, to bound the number of time series


def label_count(slots: int) -> int:
    """Rows of the cross statistics: the base, the base alone, `OTHER`, one adapter per slot, some joined names."""
    return 3 + slots + MOST_JOINED


@dataclass(slots=True)
class _Totals:
    fired_L: list[int]
    seen_L: list[int]
    mass: float = 0.0
    cross: dict[str, int] = field(default_factory=dict)


class GateCounts:
    """Owns the totals since the start, and the row of the bank's cross statistics that each selection counts in."""

    def __init__(self, bank: Bank, registry: Registry) -> None:
        self._bank = bank
        self._registry = registry
        self._totals: dict[str, _Totals] = {}
        self._rows: dict[str, int] = {OTHER: 0}

    def row(self, selected: str) -> int:
        """Row of a selection's name. Joined names beyond `MOST_JOINED`, and names that find no row, share one."""
        if selected not in self._rows:
            free = set(range(self._bank.labels)) - set(self._rows.values())
            joined = sum("+" in each for each in self._rows)
            if not free or ("+" in selected and joined >= MOST_JOINED):
                return self._rows[OTHER]
            self._rows[selected] = min(free)
        return self._rows[selected]

    def read(self) -> None:
        """Add what the bank counted since the last call to the totals of the version in each slot.

        Call it before a slot changes hands.
        """
        read = self._bank.read_totals()
        for slot in range(self._bank.slots):
            version = self._registry.in_slot(slot)
            if version is None or version.name not in self._registry:
                continue
            zeros = [0] * self._bank.layers
            totals = self._totals.setdefault(version.name, _Totals(list(zeros), list(zeros)))
            for layer in range(self._bank.layers):
                totals.fired_L[layer] += read.fired_LS[layer][slot]
                totals.seen_L[layer] += read.seen_LS[layer][slot]
            totals.mass += read.mass_S[slot]
            for selected, row in self._rows.items():
                if read.cross_KS[row][slot]:
                    totals.cross[selected] = totals.cross.get(selected, 0) + read.cross_KS[row][slot]

    def forget(self, name: str) -> None:
        """Drop an unloaded adapter's totals, and the selections that named it."""
        self._totals.pop(name, None)
        # The shared row `OTHER` stays, even if an adapter has that name.
        for selected in [s for s in self._rows if s != OTHER and name in s.split("+")]:
            del self._rows[selected]
            for totals in self._totals.values():
                totals.cross.pop(selected, None)

    def of(self, name: str) -> AdapterGates:
        """An adapter's totals as of the last `read`."""
        zeros = [0] * self._bank.layers
        totals = self._totals.get(name, _Totals(zeros, zeros))
        groups = _layer_groups(self._bank.layers)
        return AdapterGates(
            layer_groups=tuple(f"{group.start}-{group.stop - 1}" for group in groups),
            fired=tuple(sum(totals.fired_L[i] for i in group) for group in groups),
            seen=tuple(sum(totals.seen_L[i] for i in group) for group in groups),
            mass=totals.mass,
            fired_by_selected=dict(totals.cross),
        )


def _layer_groups(layers: int) -> list[range]:
    size = -(-layers // LAYER_GROUPS)
    return [range(start, min(start + size, layers)) for start in range(0, layers, size)]
