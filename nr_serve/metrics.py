"""Every Prometheus metric of the server, by name. Fed by the engine's steps and outputs; knows no HTTP, no tensors.

Histograms and counters grow as events come in. What the engine counts itself (gates, slots, adapters) is read
from it when the metrics are scraped, and shown by a collector.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from nr_serve.engine.messages import AdapterView, GateStatistics, Output, StepReport, Submit

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_MOST_SELECTED = 64


_OTHER = "other"


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._gates = _GateCollector()
        self._selected: set[str] = set()
        self.registry.register(self._gates)
        self._define_requests()
        self._define_steps()
        self._define_adapters()

    def track(self, request: Submit) -> RequestClock:
        """Start the clock of a request that is about to be submitted."""
        return RequestClock(self, request)

    def step(self, report: StepReport) -> None:
        """Count one step of the engine."""
        self.step_seconds.observe(report.seconds)
        self.step_tokens.observe(report.prefill_tokens + report.decode_tokens)
        self.step_requests.observe(report.requests)
        self.computed_tokens.labels("prefill").inc(report.prefill_tokens)
        self.computed_tokens.labels("decode").inc(report.decode_tokens)
        self.preemptions.inc(report.preemptions)
        self._set_load(report)

    def loaded(self, view: AdapterView) -> None:
        """Count an adapter that was attached or replaced."""
        self.loads.inc()
        self.load_seconds.observe(view.load_seconds)

    def unloaded(self, name: str) -> None:
        """Count an unload, and forget the labels that only this adapter needed."""
        self.unloads.inc()
        for selected in [each for each in self._selected if name in each.split("+")]:
            self.requests.remove_by_labels({"selected": selected})
            self._selected.discard(selected)

    def selected(self, name: str) -> str:
        """The label of a selection: clients may join any adapters, so only so many joined names are told apart."""
        if "+" in name and name not in self._selected and len(self._selected) >= _MOST_SELECTED:
            return _OTHER
        self._selected.add(name)
        return name

    def ended(self, selected: str, reason: str) -> None:
        """Count an answer. One whose adapter was unloaded meanwhile must not bring its name back."""
        self.requests.labels(selected if selected in self._selected else _OTHER, reason).inc()

    def render(self, gates: GateStatistics | None, adapters: Sequence[AdapterView]) -> bytes:
        """Return the exposition text; `gates` is None while the engine cannot be asked."""
        if gates is not None:
            self._set_load(gates)
        self._gates.statistics = gates
        self._gates.adapters = adapters
        return generate_latest(self.registry)

    def _set_load(self, now: StepReport | GateStatistics) -> None:
        self.running.set(now.running)
        self.waiting.set(now.waiting)
        self.pages_used.set(now.pages_used)
        self.pages_total.set(now.pages_total)

    def _define_requests(self) -> None:
        registry = self.registry
        self.requests = Counter(
            "nr_requests", "Answers ended, by selection and why", ["selected", "finish_reason"], registry=registry
        )
        self.in_flight = Gauge("nr_requests_in_flight", "Answers not ended yet", registry=registry)
        self.prompt_tokens = Counter("nr_prompt_tokens", "Prompt tokens of answered requests", registry=registry)
        self.generated_tokens = Counter("nr_generated_tokens", "Tokens written", registry=registry)
        self.first_token_seconds = Histogram(
            "nr_time_to_first_token_seconds", "From arrival to first token", buckets=_SECONDS, registry=registry
        )
        self.inter_token_seconds = Histogram(
            "nr_inter_token_seconds", "Between tokens of one answer", buckets=_STEP_SECONDS, registry=registry
        )
        self.request_seconds = Histogram(
            "nr_request_seconds", "From arrival to the last token", buckets=_SECONDS, registry=registry
        )

    def _define_steps(self) -> None:
        registry = self.registry
        self.step_seconds = Histogram(
            "nr_step_seconds", "Time of one step", buckets=_STEP_SECONDS, registry=registry
        )
        self.step_tokens = Histogram("nr_step_tokens", "Tokens in one step", buckets=_TOKENS, registry=registry)
        self.step_requests = Histogram(
            "nr_step_requests", "Requests in one step", buckets=_TOKENS, registry=registry
        )
        self.computed_tokens = Counter(
            "nr_computed_tokens",
            "Tokens the model was run on, recomputed ones included",
            ["kind"],
            registry=registry,
        )
        self.running = Gauge("nr_requests_running", "Requests that hold pages", registry=registry)
        self.waiting = Gauge("nr_requests_waiting", "Requests in the queue", registry=registry)
        self.preemptions = Counter("nr_preemptions", "Requests put back in the queue", registry=registry)
        self.pages_used = Gauge("nr_pages_used", "Pages of KV cache in use", registry=registry)
        self.pages_total = Gauge("nr_pages_total", "Pages of KV cache", registry=registry)

    def _define_adapters(self) -> None:
        registry = self.registry
        self.loads = Counter("nr_adapter_loads", "Adapters attached or replaced", registry=registry)
        self.unloads = Counter("nr_adapter_unloads", "Adapters unloaded", registry=registry)
        self.load_failures = Counter("nr_adapter_load_failures", "Loads refused or failed", registry=registry)
        self.load_seconds = Histogram(
            "nr_adapter_load_seconds", "Time to load an adapter", buckets=_SECONDS, registry=registry
        )


class RequestClock:
    """Times one request and counts its tokens."""

    def __init__(self, metrics: Metrics, request: Submit) -> None:
        self._metrics = metrics
        self._selected = metrics.selected(request.selected)
        self._prompt_tokens = len(request.prompt_ids)
        self._arrived = time.monotonic()
        self._last_token: float | None = None
        metrics.in_flight.inc()

    def output(self, output: Output) -> None:
        """Count what one step gave the request."""
        if output.tokens:
            self._tokens(len(output.tokens))
        if output.finish_reason is not None:
            self.end(output.finish_reason)

    def end(self, reason: str) -> None:
        """The request is over: `reason` is why."""
        metrics = self._metrics
        metrics.in_flight.dec()
        metrics.ended(self._selected, reason)
        if reason in ("stop", "length"):
            metrics.prompt_tokens.inc(self._prompt_tokens)
            metrics.request_seconds.observe(time.monotonic() - self._arrived)

    def _tokens(self, count: int) -> None:
        metrics, now = self._metrics, time.monotonic()
        metrics.generated_tokens.inc(count)
        if self._last_token is None:
            metrics.first_token_seconds.observe(now - self._arrived)
        else:
            for _ in range(count):
                metrics.inter_token_seconds.observe((now - self._last_token) / count)
        self._last_token = now


class _GateCollector(Collector):
    """Shows the engine's own totals as they were last read."""

    def __init__(self) -> None:
        self.statistics: GateStatistics | None = None
        self.adapters: Sequence[AdapterView] = ()

    def collect(self) -> Iterator[Metric]:
        yield from self._adapters()
        if self.statistics is not None:
            yield from self._gates(self.statistics)
            yield from self._slots(self.statistics)

    def _adapters(self) -> Iterator[Metric]:
        nbytes = GaugeMetricFamily("nr_adapter_bytes", "Size of an adapter's tensors", labels=["adapter"])
        leak = GaugeMetricFamily(
            "nr_adapter_leak_ratio",
            "Share of a probe text's token-layers on which the adapter's gates fired when it was measured",
            labels=["adapter", "probe"],
        )
        for view in self.adapters:
            nbytes.add_metric([view.name], view.nbytes)
            for name, measured in (view.neutrality or {}).items():
                leak.add_metric([view.name, name], measured.rate)
        yield from (nbytes, leak)

    @staticmethod
    def _gates(statistics: GateStatistics) -> Iterator[Metric]:
        labels = ["adapter", "layer_group"]
        fired = CounterMetricFamily("nr_gate_fired", "Token-layers whose gate fired", labels=labels)
        seen = CounterMetricFamily("nr_gate_seen", "Token-layers evaluated", labels=labels)
        mass = CounterMetricFamily("nr_gate_mass", "Sum of gate values", labels=["adapter"])
        cross = CounterMetricFamily(
            "nr_cross_fired", "Token-layers fired, by whose traffic it was", labels=["adapter", "selected"]
        )
        for name, gates in statistics.adapters.items():
            mass.add_metric([name], gates.mass)
            for group, group_fired, group_seen in zip(gates.layer_groups, gates.fired, gates.seen, strict=True):
                fired.add_metric([name, group], group_fired)
                seen.add_metric([name, group], group_seen)
        for (name, selected), count in statistics.cross.items():
            cross.add_metric([name, selected], count)
        yield from (fired, seen, mass, cross)

    @staticmethod
    def _slots(statistics: GateStatistics) -> Iterator[Metric]:
        yield GaugeMetricFamily("nr_slots_used", "Slots that hold an adapter", value=statistics.slots_used)
        yield GaugeMetricFamily("nr_slots_total", "Slots for adapters", value=statistics.slots_total)
