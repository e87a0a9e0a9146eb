"""Every metric of the server, once: its name as scraped, its kind, what it means, its labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric. `buckets`: a histogram's upper bounds, in the metric's unit."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def counter(self, registry: CollectorRegistry) -> Counter:
        """A counter that counts events as they come."""
        return Counter(self.name, self.meaning, self.labels, registry=registry)

    def gauge(self, registry: CollectorRegistry) -> Gauge:
        """A gauge whose value is set."""
        return Gauge(self.name, self.meaning, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        """A histogram that observes events as they come."""
        return Histogram(self.name, self.meaning, self.labels, buckets=self.buckets, registry=registry)

    def shown(self) -> CounterMetricFamily | GaugeMetricFamily:
        """An empty metric family, for values that are kept elsewhere."""
        family = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        return family(self.name, self.meaning, labels=self.labels)


DEFINITIONS: list[Definition] = []


def _counter(name: str, meaning: str, *labels: str) -> Definition:
    return _add(Definition(name, "counter", meaning, labels))


def _gauge(name: str, meaning: str, *labels: str) -> Definition:
    return _add(Definition(name, "gauge", meaning, labels))


def _histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Definition:
    return _add(Definition(name, "histogram", meaning, buckets=buckets))


def _add(definition: Definition) -> Definition:
    DEFINITIONS.append(definition)
    return definition


# The server
READY = _gauge("nr_ready", "1 while requests are taken, else 0")
INFO = _gauge("nr_server_info", "Always 1; the labels say what is served", "version", "model", "device", "dtype")

# Requests
REQUESTS = _counter("nr_requests_total", "Answers ended, by selection and why", "selected", "finish_reason")
ERRORS = _counter("nr_request_errors_total", "Answers ended by an error, by its type in the API", "type")
HTTP_ERRORS = _counter(
    "nr_http_errors_total", "Requests answered with an HTTP error, by its status and type", "status", "type"
)
IN_FLIGHT = _gauge("nr_requests_in_flight", "Answers not ended yet")
PROMPT_TOKENS = _counter("nr_prompt_tokens_total", "Prompt tokens of requests whose prompt was read")
GENERATED_TOKENS = _counter("nr_generated_tokens_total", "Tokens written")
REQUEST_PROMPT_TOKENS = _histogram("nr_request_prompt_tokens", "Length of the prompt of a whole answer", _COUNTS)
REQUEST_GENERATED_TOKENS = _histogram("nr_request_generated_tokens", "Length of a whole answer", _COUNTS)
FIRST_TOKEN_SECONDS = _histogram("nr_time_to_first_token_seconds", "From arrival to first token", _SECONDS)
INTER_TOKEN_SECONDS = _histogram("nr_inter_token_seconds", "Between tokens of one answer", _STEP_SECONDS)
REQUEST_SECONDS = _histogram("nr_request_seconds", "From arrival to the end of a whole answer", _SECONDS)
QUEUE_SECONDS = _histogram("nr_request_queue_seconds", "From arrival to the request's first step", _SECONDS)
PREFILL_SECONDS = _histogram(
    "nr_request_prefill_seconds", "From its first step until its prompt was read", _SECONDS
)
DECODE_SECONDS = _histogram("nr_request_decode_seconds", "From first to last token of a whole answer", _SECONDS)

# Steps
STEP_SECONDS = _histogram("nr_step_seconds", "Time of one step", _STEP_SECONDS)
STEP_TOKENS = _histogram("nr_step_tokens", "Tokens in one step", _COUNTS)
STEP_REQUESTS = _histogram("nr_step_requests", "Requests in one step", _COUNTS)
LAST_STEP = _gauge("nr_last_step_timestamp_seconds", "Unix time at which the last step ended; 0 before the first")
COMPUTED_TOKENS = _counter(
    "nr_computed_tokens_total", "Tokens the model was run on, recomputed ones included", "kind"
)
RUNNING = _gauge("nr_requests_running", "Requests that hold pages")
WAITING = _gauge("nr_requests_waiting", "Requests in the queue")
PREEMPTIONS = _counter("nr_preemptions_total", "Requests put back in the queue")
PAGES_USED = _gauge("nr_pages_used", "Pages of KV cache in use")
PAGES_TOTAL = _gauge("nr_pages_total", "Pages of KV cache")
PREFIX_TOKENS = _counter("nr_prefix_tokens_total", "Tokens of admitted requests, looked up in the prefix cache")
PREFIX_HIT_TOKENS = _counter("nr_prefix_hit_tokens_total", "Those of them that were found, and not computed again")
PREFIX_NEUTRAL_HIT_TOKENS = _counter(
    "nr_prefix_neutral_hit_tokens_total", "Those found that were computed under another selection"
)

# Adapters
LOADS = _counter("nr_adapter_loads_total", "Adapters attached or replaced")
UNLOADS = _counter("nr_adapter_unloads_total", "Adapters unloaded")
LOAD_FAILURES = _counter("nr_adapter_load_failures_total", "Loads refused or failed, or undone")
LOAD_SECONDS = _histogram("nr_adapter_load_seconds", "Time to load an adapter", _SECONDS)
ADAPTER_BYTES = _gauge("nr_adapter_bytes", "Size of an adapter's tensors", "adapter")
ADAPTER_LEAK = _gauge(
    "nr_adapter_leak_ratio",
    "Share of a probe text's token-layers on which the adapter's gates fired when it was measured",
    "adapter",
    "probe",
)
SLOTS_USED = _gauge("nr_slots_used", "Slots that hold an adapter")
SLOTS_TOTAL = _gauge("nr_slots_total", "Slots for adapters")

# Gates
GATE_FIRED = _counter(
    "nr_gate_fired_total", "Of those seen, token-layers whose gate fired", "adapter", "layer_group"
)
GATE_SEEN = _counter(
    "nr_gate_seen_total", "Token-layers of requests that may use the adapter", "adapter", "layer_group"
)
GATE_MASS = _counter("nr_gate_mass_total", "Sum of gate values", "adapter")
CROSS_FIRED = _counter(
    "nr_cross_fired_total",
    "Token-layers whose gate was open, selected or not, by whose traffic it was",
    "adapter",
    "selected",
)


def metrics_table() -> str:
    """The metrics as a Markdown table; docs/metrics.md holds it."""
    rows = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    for each in DEFINITIONS:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        rows.append(f"| `{each.name}` | {each.kind} | {labels} | {each.meaning} |")
    return "\n".join(rows)
