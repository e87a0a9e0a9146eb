"""The server's Prometheus metrics. Fed by the engine's steps and outputs; knows no HTTP, no tensors.

definitions   every metric by name, once; docs/metrics.md is made from it
instruments   `Metrics`: counters and histograms updated as events come in
clock         `RequestClock`: one request's times and tokens
totals        statistics that the engine counts itself, shown as of the last read
vllm          the same metrics under vLLM's names, if asked for
"""

from nr_serve.metrics.clock import RequestClock
from nr_serve.metrics.definitions import metrics_table
from nr_serve.metrics.instruments import Metrics
from nr_serve.metrics.vllm import VllmCollector

__all__ = ["Metrics", "RequestClock", "VllmCollector", "metrics_table"]
