"""Statistics that the engine counts itself, shown as of the last read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from nr_serve.engine.messages import AdapterView, EngineStatistics
from nr_serve.metrics import definitions


class EngineTotals(Collector):
    """Metrics of adapters, slots and gates. Only registered adapters appear: the name goes with the adapter."""

    def __init__(self) -> None:
        self.statistics: EngineStatistics | None = None
        self.adapters: Sequence[AdapterView] = ()

    def collect(self) -> Iterator[Metric]:
        """Every metric family; those of slots only once the engine's statistics were read."""
        yield from self._adapters()
        yield from self._gates()
        if self.statistics is not None:
            yield from self._slots(self.statistics)

    def _adapters(self) -> Iterator[Metric]:
        nbytes, leak = definitions.ADAPTER_BYTES.shown(), definitions.ADAPTER_LEAK.shown()
        for view in self.adapters:
            nbytes.add_metric([view.name], view.nbytes)
            for name, measured in (view.neutrality or {}).items():
                leak.add_metric([view.name, name], measured.rate)
        yield from (nbytes, leak)

    def _gates(self) -> Iterator[Metric]:
        fired, seen = definitions.GATE_FIRED.shown(), definitions.GATE_SEEN.shown()
        mass, cross = definitions.GATE_MASS.shown(), definitions.CROSS_FIRED.shown()
        for view in self.adapters:
            name, gates = view.name, view.gates
            mass.add_metric([name], gates.mass)
            for group, group_fired, group_seen in zip(gates.layer_groups, gates.fired, gates.seen, strict=True):
                fired.add_metric([name, group], group_fired)
                seen.add_metric([name, group], group_seen)
            for selected, count in gates.fired_by_selected.items():
                cross.add_metric([name, selected], count)
        yield from (fired, seen, mass, cross)

    @staticmethod
    def _slots(statistics: EngineStatistics) -> Iterator[Metric]:
        used, total = definitions.SLOTS_USED.shown(), definitions.SLOTS_TOTAL.shown()
        used.add_metric([], statistics.slots_used)
        total.add_metric([], statistics.slots_total)
        yield from (used, total)
