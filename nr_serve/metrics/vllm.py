"""The same metrics under vLLM's names, as dashboards and the Kubernetes inference gateway read them.

Names, labels and meanings are those of vLLM's metrics and of the Gateway API inference extension's model server
protocol. The values are those of our own instruments at the time of the scrape.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nr_serve.engine.messages import EngineStatistics, Outcome
from nr_serve.metrics.instruments import Metrics


class VllmCollector(Collector):
    """Shows the metrics under vLLM's names."""

    def __init__(self, metrics: Metrics, model: str, page_size: int) -> None:
        """`model`: name under which the base is served; `page_size`: tokens per page, which vLLM calls a block."""
        self._labels = {"model_name": model, "engine": "0"}  # nearly every metric has these; there is one engine
        self._page_size = page_size
        self._metrics = metrics
        self._totals = metrics.totals
        self._renamed = {
            "vllm:num_requests_running": metrics.running,
            "vllm:num_requests_waiting": metrics.waiting,
            "vllm:num_preemptions": metrics.preemptions,
            "vllm:prefix_cache_queries": metrics.prefix_tokens,
            "vllm:prefix_cache_hits": metrics.prefix_hit_tokens,
            "vllm:prompt_tokens": metrics.prompt_tokens,
            "vllm:generation_tokens": metrics.generated_tokens,
            "vllm:iteration_tokens_total": metrics.step_tokens,
            "vllm:request_prompt_tokens": metrics.request_prompt_tokens,
            "vllm:request_generation_tokens": metrics.request_generated_tokens,
            "vllm:time_to_first_token_seconds": metrics.first_token_seconds,
            "vllm:inter_token_latency_seconds": metrics.inter_token_seconds,
            "vllm:time_per_output_token_seconds": metrics.inter_token_seconds,  # the metric's older name
            "vllm:e2e_request_latency_seconds": metrics.request_seconds,
            "vllm:request_queue_time_seconds": metrics.queue_seconds,
            "vllm:request_prefill_time_seconds": metrics.prefill_seconds,
            "vllm:request_decode_time_seconds": metrics.decode_seconds,
        }

    def describe(self) -> Iterator[Metric]:
        """No families: the values come from instruments that are registered already."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Every metric family; those that need the engine's statistics only once these were read."""
        for name, source in self._renamed.items():
            yield _renamed(source, name, self._labels)
        yield self._request_success()
        if self._totals.statistics is not None:
            yield from self._cache(self._totals.statistics)
            yield self._adapters(self._totals.statistics)

    def _request_success(self) -> Metric:
        """Ended answers by reason only, as in vLLM; our own counter is by selection, and drops some of them."""
        labels = self._labels
        success = CounterMetricFamily(
            "vllm:request_success", "Answers ended, by why", labels=[*labels, "finished_reason"]
        )
        for reason in get_args(Outcome):
            success.add_metric([*labels.values(), reason], self._metrics.ended_by[reason])
        return success

    def _cache(self, statistics: EngineStatistics) -> Iterator[Metric]:
        labels = self._labels
        used = statistics.pages_used / statistics.pages_total
        for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):  # new name, older name
            usage = GaugeMetricFamily(name, "Share of the KV cache's pages in use, 0 to 1", labels=[*labels])
            usage.add_metric([*labels.values()], used)
            yield usage
        facts = {"block_size": str(self._page_size), "num_gpu_blocks": str(statistics.pages_total)}
        facts |= {"engine": labels["engine"]}
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "Always 1; the labels describe the KV cache", labels=[*facts]
        )
        info.add_metric([*facts.values()], 1)
        yield info

    def _adapters(self, statistics: EngineStatistics) -> Metric:
        """The attached adapters, for a gateway that routes a request to a server that has its adapter.

        By default every attached adapter may act (the gates route), so running requests do not say which adapters
        are in use. `running` therefore names every attached adapter, as the protocol asks for those loaded and
        ready. `waiting` names adapters without a slot that a request in flight chose by name. Both change when
        adapters do, not with each request, so they create few time series.
        """
        views, named = self._totals.adapters, self._metrics.named
        attached = sorted(view.name for view in views if view.state == "attached")
        wanted = sorted(view.name for view in views if view.state != "attached" and view.name in named)
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Unix time of the scrape; the labels name the adapters",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        info.add_metric([str(statistics.slots_total), ",".join(attached), ",".join(wanted)], time.time())
        return info


def _renamed(source: Collector, name: str, labels: dict[str, str]) -> Metric:
    """The source's only metric family, with another name and more labels."""
    (family,) = source.collect()
    renamed = Metric(name, family.documentation, family.type)
    for sample in family.samples:
        if not sample.name.endswith("_created"):
            end = sample.name.removeprefix(family.name)
            renamed.add_sample(name + end, labels | sample.labels, sample.value)
    return renamed
