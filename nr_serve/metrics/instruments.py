"""The instruments: counters, gauges and histograms that follow requests, steps and adapters."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.process_collector import ProcessCollector

from nr_serve import __version__
from nr_serve.engine.messages import AdapterView, EngineInfo, EngineStatistics, Outcome, StepReport, Submit
from nr_serve.metrics import definitions
from nr_serve.metrics.totals import EngineTotals
from nr_serve.names import MOST_JOINED, OTHER


class Metrics:
    """The server's metrics, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.totals = EngineTotals()
        self._selected: set[str] = set()
        self.named: Tally[str] = Tally()
        """How many requests in flight chose each adapter by name."""
        self.ended_by: Tally[Outcome] = Tally()
        """Number of answers ended by each reason, over all selections; `requests` drops some selections."""
        self.registry.register(self.totals)
        self._define_requests()
        self._define_steps()
        self._define_adapters()

    def serves(self, info: EngineInfo) -> None:
        """Set the labels that describe what the engine serves; call it once the engine is ready."""
        self.info.labels(__version__, info.model, info.device, info.dtype).set(1)

    def began(self, request: Submit) -> None:
        """Count a request that is about to be submitted."""
        self.in_flight.inc()
        self.named.update(request.adapters or ())

    def step(self, report: StepReport) -> None:
        """Count one step of the engine."""
        self.step_seconds.observe(report.seconds)
        self.step_tokens.observe(report.prefill_tokens + report.decode_tokens)
        self.step_requests.observe(report.requests)
        self.last_step.set(time.time())
        self.computed_tokens.labels("prefill").inc(report.prefill_tokens)
        self.computed_tokens.labels("decode").inc(report.decode_tokens)
        self.preemptions.inc(report.preemptions)
        self.prefix_tokens.inc(report.prefix.asked)
        self.prefix_hit_tokens.inc(report.prefix.found)
        self.prefix_neutral_hit_tokens.inc(report.prefix.neutral)

    def loaded(self, view: AdapterView) -> None:
        """Count an adapter that was attached or replaced."""
        self.loads.inc()
        self.load_seconds.observe(view.load_seconds)

    def unloaded(self, name: str) -> None:
        """Count an unload, and drop the label values that name this adapter."""
        self.unloads.inc()
        for selected in [each for each in self._selected if name in each.split("+")]:
            self.requests.remove_by_labels({"selected": selected})
            self._selected.discard(selected)

    def selected(self, name: str) -> str:
        """The label value for a selection; joined names beyond `MOST_JOINED` share the value `OTHER`."""
        joined = sum("+" in each for each in self._selected)
        if "+" in name and name not in self._selected and joined >= MOST_JOINED:
            return OTHER
        self._selected.add(name)
        return name

    def ended(self, request: Submit, selected: str, reason: Outcome) -> None:
        """Count an ended answer. If its adapter was unloaded meanwhile, it counts as `OTHER`."""
        self.in_flight.dec()
        self.named -= Tally(request.adapters or ())
        self.requests.labels(selected if selected in self._selected else OTHER, reason).inc()
        self.ended_by[reason] += 1

    def render(self, statistics: EngineStatistics | None, adapters: Sequence[AdapterView]) -> bytes:
        """Return the metrics as text; `statistics` is None until the engine can be asked."""
        if statistics is not None:
            self.running.set(statistics.running)
            self.waiting.set(statistics.waiting)
            self.pages_used.set(statistics.pages_used)
            self.pages_total.set(statistics.pages_total)
        self.totals.statistics = statistics
        self.totals.adapters = adapters
        return generate_latest(self.registry)

    def _define_requests(self) -> None:
        registry = self.registry
        self.ready = definitions.READY.gauge(registry)
        self.info = definitions.INFO.gauge(registry)
        self.requests = definitions.REQUESTS.counter(registry)
        self.errors = definitions.ERRORS.counter(registry)
        self.http_errors = definitions.HTTP_ERRORS.counter(registry)
        self.in_flight = definitions.IN_FLIGHT.gauge(registry)
        self.prompt_tokens = definitions.PROMPT_TOKENS.counter(registry)
        self.generated_tokens = definitions.GENERATED_TOKENS.counter(registry)
        self.request_prompt_tokens = definitions.REQUEST_PROMPT_TOKENS.histogram(registry)
        self.request_generated_tokens = definitions.REQUEST_GENERATED_TOKENS.histogram(registry)
        self.first_token_seconds = definitions.FIRST_TOKEN_SECONDS.histogram(registry)
        self.inter_token_seconds = definitions.INTER_TOKEN_SECONDS.histogram(registry)
        self.request_seconds = definitions.REQUEST_SECONDS.histogram(registry)
        self.queue_seconds = definitions.QUEUE_SECONDS.histogram(registry)
        self.prefill_seconds = definitions.PREFILL_SECONDS.histogram(registry)
        self.decode_seconds = definitions.DECODE_SECONDS.histogram(registry)

    def _define_steps(self) -> None:
        registry = self.registry
        self.step_seconds = definitions.STEP_SECONDS.histogram(registry)
        self.step_tokens = definitions.STEP_TOKENS.histogram(registry)
        self.step_requests = definitions.STEP_REQUESTS.histogram(registry)
        self.last_step = definitions.LAST_STEP.gauge(registry)
        self.computed_tokens = definitions.COMPUTED_TOKENS.counter(registry)
        self.running = definitions.RUNNING.gauge(registry)
        self.waiting = definitions.WAITING.gauge(registry)
        self.preemptions = definitions.PREEMPTIONS.counter(registry)
        self.pages_used = definitions.PAGES_USED.gauge(registry)
        self.pages_total = definitions.PAGES_TOTAL.gauge(registry)
        self.prefix_tokens = definitions.PREFIX_TOKENS.counter(registry)
        self.prefix_hit_tokens = definitions.PREFIX_HIT_TOKENS.counter(registry)
        self.prefix_neutral_hit_tokens = definitions.PREFIX_NEUTRAL_HIT_TOKENS.counter(registry)

    def _define_adapters(self) -> None:
        registry = self.registry
        self.loads = definitions.LOADS.counter(registry)
        self.unloads = definitions.UNLOADS.counter(registry)
        self.load_failures = definitions.LOAD_FAILURES.counter(registry)
        self.load_seconds = definitions.LOAD_SECONDS.histogram(registry)
