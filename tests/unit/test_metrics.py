import asyncio
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nr_serve.api import bridge, request_state
from nr_serve.api.bridge import AsyncEngine
from nr_serve.engine.messages import (
    EngineStatistics,
    Leak,
    Output,
    PrefixTokens,
    ReadStatistics,
    Sampling,
    StepReport,
    Submit,
    Token,
)
from nr_serve.errors import QueueFull, Unavailable
from nr_serve.metrics import Metrics, RequestClock, VllmCollector, metrics_table
from nr_serve.metrics import clock as clock_module
from nr_serve.metrics.definitions import DEFINITIONS
from tests.fakes import FakeEngine, serving, view
from tests.waiting import PATIENCE

DOCS = Path(__file__).parents[2] / "docs"

GATES = {"nr_gate_fired_total", "nr_gate_seen_total", "nr_gate_mass_total", "nr_cross_fired_total"}
REQUESTS = {
    "nr_requests_total", "nr_requests_in_flight", "nr_requests_running", "nr_requests_waiting",
    "nr_prompt_tokens_total", "nr_generated_tokens_total", "nr_preemptions_total", "nr_time_to_first_token_seconds",
    "nr_inter_token_seconds", "nr_request_seconds", "nr_step_seconds", "nr_step_tokens", "nr_step_requests",
    "nr_computed_tokens_total", "nr_pages_used", "nr_pages_total", "nr_request_queue_seconds",
    "nr_request_prefill_seconds", "nr_request_decode_seconds", "nr_request_prompt_tokens",
    "nr_request_generated_tokens", "nr_last_step_timestamp_seconds", "nr_ready", "nr_server_info",
    "nr_http_errors_total", "nr_prefix_tokens_total", "nr_prefix_hit_tokens_total",
    "nr_prefix_neutral_hit_tokens_total",
}  # fmt: skip
ADAPTERS = {
    "nr_adapter_loads_total", "nr_adapter_unloads_total", "nr_adapter_load_failures_total",
    "nr_adapter_load_seconds", "nr_adapter_bytes", "nr_adapter_leak_ratio", "nr_slots_used", "nr_slots_total",
}  # fmt: skip


def samples(metrics: Metrics) -> dict[str, float]:
    return read(metrics.render(None, ()).decode())


def read(text: str) -> dict[str, float]:
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def submit(**more) -> Submit:
    return Submit("r", (1, 2, 3), Sampling(), selected="base", **more)


def test_times_count_from_when_the_whole_request_was_there(monkeypatch):
    with serving() as served:
        monkeypatch.setattr(request_state, "time", SimpleNamespace(monotonic=lambda: time.monotonic() - 1000))
        assert served.complete(max_tokens=1).status_code == 200
        got = read(served.http.get("/metrics").text)
    for name in ("time_to_first_token", "request"):
        assert 1000 < got[f"nr_{name}_seconds_sum"] < 1000 + PATIENCE


def test_a_request_is_timed_and_its_tokens_counted(monkeypatch):
    now = 100.0
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(monotonic=lambda: now))
    metrics = Metrics()
    clock = RequestClock(metrics, submit())
    assert samples(metrics)["nr_requests_in_flight"] == 1
    now = 104.0
    clock.output(Output("r", tokens=(Token(1, "a"),), started=101.0))
    now = 110.0
    clock.output(Output("r", tokens=(Token(1, "a"), Token(2, "b"))))
    now = 112.0
    clock.output(Output("r", finish_reason="stop"))
    got = samples(metrics)
    assert got['nr_requests_total{finish_reason="stop",selected="base"}'] == 1
    assert got["nr_requests_in_flight"] == 0
    assert (got["nr_prompt_tokens_total"], got["nr_generated_tokens_total"]) == (3, 3)
    assert (got["nr_request_prompt_tokens_sum"], got["nr_request_generated_tokens_sum"]) == (3, 3)
    times = {"request_queue": 1, "request_prefill": 3, "time_to_first_token": 4, "request_decode": 6, "request": 12}
    for name, seconds in times.items():
        assert (got[f"nr_{name}_seconds_count"], got[f"nr_{name}_seconds_sum"]) == (1, seconds), name
    assert (got["nr_inter_token_seconds_count"], got["nr_inter_token_seconds_sum"]) == (2, 3 + 3)


def test_errors_are_told_apart_by_their_type():
    metrics = Metrics()
    for error in (QueueFull("full"), QueueFull("full"), Unavailable("stopped")):
        RequestClock(metrics, submit()).output(Output("r", finish_reason="error", error=error))
    RequestClock(metrics, submit()).end("abort")
    got = samples(metrics)
    assert got['nr_request_errors_total{type="RateLimitError"}'] == 2
    assert got['nr_request_errors_total{type="ServiceUnavailableError"}'] == 1
    assert got['nr_requests_total{finish_reason="error",selected="base"}'] == 3


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_a_request_without_a_whole_answer_is_counted_but_not_timed(reason):
    metrics = Metrics()
    RequestClock(metrics, submit()).end(reason)
    got = samples(metrics)
    assert got[f'nr_requests_total{{finish_reason="{reason}",selected="base"}}'] == 1
    assert got["nr_request_seconds_count"] == got["nr_prompt_tokens_total"] == 0


def test_a_step_adds_to_the_counters():
    metrics = Metrics()
    for _ in range(2):
        metrics.step(StepReport(0.1, 5, 3, 4, 1, PrefixTokens(40, 32, 16)))
    got = samples(metrics)
    prefix = [got[f"nr_prefix_{name}_total"] for name in ("tokens", "hit_tokens", "neutral_hit_tokens")]
    assert prefix == [80, 64, 32]
    assert got["nr_preemptions_total"] == 2
    assert (got["nr_step_tokens_sum"], got["nr_step_requests_sum"], got["nr_step_seconds_count"]) == (16, 8, 2)
    assert got["nr_step_seconds_sum"] == pytest.approx(0.2)
    assert [got[f'nr_computed_tokens_total{{kind="{kind}"}}'] for kind in ("prefill", "decode")] == [10, 6]
    assert abs(got["nr_last_step_timestamp_seconds"] - time.time()) < 60


def test_an_unloaded_adapter_leaves_no_label_behind():
    metrics = Metrics()
    ended, late = (RequestClock(metrics, Submit("r", (1,), Sampling(), selected="hu")) for _ in range(2))
    ended.end("stop")
    assert 'selected="hu"' in metrics.render(None, ()).decode()
    metrics.unloaded("hu")
    late.end("stop")
    assert 'selected="hu"' not in metrics.render(None, ()).decode()
    assert samples(metrics)['nr_requests_total{finish_reason="stop",selected="other"}'] == 1
    assert samples(metrics)["nr_adapter_unloads_total"] == 1


def test_an_adapter_that_was_not_measured_has_no_leak():
    text = Metrics().render(None, (view("hu", neutrality=None),)).decode()
    assert 'nr_adapter_bytes{adapter="hu"}' in text
    assert "nr_adapter_leak_ratio{" not in text


def test_joined_selections_go_with_each_adapter_in_them_and_only_so_many_are_told_apart():
    metrics = Metrics()
    for selected in ("base", "da+hu", "sk"):
        RequestClock(metrics, Submit("r", (1,), Sampling(), selected=selected)).end("stop")
    metrics.unloaded("hu")
    text = metrics.render(None, ()).decode()
    assert "da+hu" not in text
    assert 'selected="sk"' in text
    for i in range(1000):
        RequestClock(metrics, Submit("r", (1,), Sampling(), selected=f"da+x{i}")).end("stop")
    RequestClock(metrics, submit()).end("stop")
    got = {name: value for name, value in samples(metrics).items() if name.startswith("nr_requests_total")}
    assert sum("+" in name for name in got) == 61
    assert got['nr_requests_total{finish_reason="stop",selected="other"}'] > 900
    assert got['nr_requests_total{finish_reason="stop",selected="base"}'] == 2


def test_what_runs_and_waits_is_asked_when_the_metrics_are_read():
    with serving() as server:
        server.complete(max_tokens=2)
        server.engine.load = (3, 4, 5, 6)  # aborts, say: no step has reported them
        got = read(server.http.get("/metrics").text)
    assert (got["nr_requests_running"], got["nr_requests_waiting"]) == (3, 4)
    assert (got["nr_pages_used"], got["nr_pages_total"]) == (5, 6)


def test_the_server_exports_every_metric_with_help():
    with serving() as server:
        server.complete(max_tokens=3)
        server.http.put("/v1/adapters/da", content=b"good")
        server.http.put("/v1/adapters/x", content=b"bad")
        server.http.delete("/v1/adapters/hu")
        text = server.http.get("/metrics").text
    names = {re.sub(r"(_bucket|_sum|_count|_created)?(\{.*)?$", "", name) for name in read(text)}
    assert names >= REQUESTS | ADAPTERS | GATES
    got = read(text)
    assert got["nr_ready"] == 1
    (info,) = [name for name in got if name.startswith("nr_server_info{")]
    assert 'model="base"' in info
    assert got["nr_adapter_loads_total"] == 2  # one was there at the start
    assert got["nr_adapter_load_seconds_sum"] == 2 * 0.25
    assert got["nr_adapter_unloads_total"] == got["nr_adapter_load_failures_total"] == 1
    assert got['nr_gate_fired_total{adapter="da",layer_group="0-1"}'] == 3
    assert got['nr_gate_mass_total{adapter="da"}'] == 2.5
    assert got['nr_cross_fired_total{adapter="da",selected="base"}'] == 4
    assert got['nr_adapter_bytes{adapter="da"}'] == 1000
    leaks = {name: value for name, value in got.items() if name.startswith("nr_adapter_leak_ratio")}
    assert leaks == {
        'nr_adapter_leak_ratio{adapter="da",probe="prose"}': 0.0025,
        'nr_adapter_leak_ratio{adapter="da",probe="code"}': 0.0075,
    }, "of registered adapters only"
    for line in text.splitlines():
        if line.startswith("# HELP nr_"):
            assert len(line.split(" ", 3)[3]) > 5


def test_a_leak_measured_since_is_shown(monkeypatch):
    monkeypatch.setattr(bridge, "_READ_SECONDS", PATIENCE)
    with serving() as server:
        server.engine.adapters["hu"] = view("hu", neutrality={"prose": Leak(2, 400, 100)})
        got = read(server.http.get("/metrics").text)
    assert got['nr_adapter_leak_ratio{adapter="hu",probe="prose"}'] == 0.005


def test_metrics_do_not_wait_for_an_engine_that_loads():
    with serving(loading=True) as server:
        assert "nr_slots_used" not in server.http.get("/metrics").text
        assert server.engine.commands == []


def test_every_metric_has_its_definition_and_no_two_share_a_name():
    with serving() as server:
        families = list(text_string_to_metric_families(server.http.get("/metrics").text))
    shown = {f.name + "_total" * (f.type == "counter"): f for f in families if not f.name.endswith("_created")}
    ours = {name: family for name, family in shown.items() if name.startswith("nr_")}
    assert sorted(ours) == sorted(each.name for each in DEFINITIONS)
    for each in DEFINITIONS:
        assert (each.kind, each.meaning) == (ours[each.name].type, ours[each.name].documentation)
        for sample in ours[each.name].samples:
            assert set(sample.labels) - {"le"} == set(each.labels)


def test_the_metrics_page_holds_the_metrics():
    assert metrics_table() in (DOCS / "metrics.md").read_text(encoding="utf-8"), (
        "docs/metrics.md is out of date: paste what nr_serve.metrics.metrics_table() returns"
    )


class Reader:
    """An AsyncEngine over the fake engine, with the engine held in a step."""

    def __init__(self) -> None:
        self.engine = AsyncEngine(self._build, Metrics())

    def _build(self, deliver):
        self.fake = FakeEngine(deliver)
        return self.fake

    async def ready(self) -> None:
        while self.engine.status != "ready":
            await asyncio.sleep(0.01)


def test_a_request_for_what_was_unloaded_since_brings_no_name_back():
    reader = Reader()

    async def asked() -> str:
        async with reader.engine.running():
            await reader.ready()
            gone = Submit("r", (1,), Sampling(), adapters=("hu", "gone"), selected="hu+gone")
            async for _ in reader.engine.generate([gone]):
                pass
            return (await reader.engine.scrape()).decode()

    text = asyncio.run(asked())
    assert "gone" not in text
    assert read(text)['nr_requests_total{finish_reason="length",selected="other"}'] == 1


def test_a_scrape_does_not_wait_for_a_long_step(monkeypatch):
    monkeypatch.setattr(bridge, "_READ_SECONDS", PATIENCE)
    reader = Reader()

    async def scrapes() -> list[bytes]:
        async with reader.engine.running():
            await reader.ready()
            reader.fake.load = (3, 4, 5, 100)
            texts = [await reader.engine.scrape()]
            monkeypatch.setattr(bridge, "_READ_SECONDS", 0.01)
            reader.fake.steps_may_run.clear()
            answer = asyncio.create_task(anext(reader.engine.generate([submit()])))
            await asyncio.to_thread(reader.fake.stands.wait, PATIENCE)
            reader.fake.load = (9, 9, 9, 100)  # as the engine would say, could it be asked
            texts += [await reader.engine.scrape(), await reader.engine.scrape()]
            assert reader.fake.commands.count(ReadStatistics()) == 3, "what is not answered is not asked again"
            reader.fake.steps_may_run.set()
            await answer
            return texts

    texts = [read(text.decode()) for text in asyncio.run(scrapes())]
    assert [text["nr_requests_in_flight"] for text in texts] == [0, 1, 1]
    assert [text["nr_requests_waiting"] for text in texts] == [4, 4, 4]


def test_an_engine_that_failed_is_not_ready():
    with serving() as server:
        assert read(server.http.get("/metrics").text)["nr_ready"] == 1
        server.engine.fail("the device is gone")
        server.until("/health", 503)
        got = read(server.http.get("/metrics").text)
    assert got["nr_ready"] == 0
    assert "nr_slots_used" not in got


# vLLM's names. What its dashboards and the inference gateway's endpoint picker read, taken from their sources.

DASHBOARDS = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
    "vllm:request_success_total", "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket", "vllm:time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket", "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum", "vllm:request_decode_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket",
    "vllm:iteration_tokens_total_bucket", "vllm:gpu_cache_usage_perc",
}  # fmt: skip


def vllm_metrics() -> Metrics:
    metrics = Metrics()
    metrics.registry.register(VllmCollector(metrics, "base", 16))
    return metrics


def statistics(**more) -> EngineStatistics:
    values = {"slots_used": 1, "slots_total": 8, "running": 3, "waiting": 4, "pages_used": 25, "pages_total": 100}
    return EngineStatistics({}, **(values | more))


def picked(metrics: Metrics, *adapters) -> dict[str, list]:
    """Samples by name as (labels, value)."""
    got: dict[str, list] = {}
    for family in text_string_to_metric_families(metrics.render(statistics(), adapters).decode()):
        for sample in family.samples:
            got.setdefault(sample.name, []).append((sample.labels, sample.value))
    return got


def test_vllms_names_are_shown_only_if_asked_for():
    assert b"vllm:" not in Metrics().render(statistics(), ())
    assert b"vllm:" in vllm_metrics().render(statistics(), ())


def test_vllms_dashboards_find_what_they_read():
    metrics = vllm_metrics()
    for reason in ("stop", "length", "abort"):
        RequestClock(metrics, submit()).end(reason)
    got = picked(metrics)
    assert set(got) >= DASHBOARDS
    for name in DASHBOARDS:
        for labels, _ in got[name]:
            assert (labels["model_name"], labels["engine"]) == ("base", "0"), name


def test_what_is_shown_under_vllms_names_is_what_is_shown_under_ours():
    metrics = vllm_metrics()
    for selected in ("base", "hu"):
        clock = RequestClock(metrics, Submit("r", (1, 2, 3), Sampling(), selected=selected))
        clock.output(Output("r", tokens=(Token(1, "a"),), started=time.monotonic()))
        clock.output(Output("r", tokens=(Token(1, "a"),), finish_reason="stop"))
    RequestClock(metrics, submit()).end("abort")
    metrics.step(StepReport(0.1, 5, 3, 4, 1, PrefixTokens(40, 32, 16)))
    got = picked(metrics)
    value = {name: samples[0][1] for name, samples in got.items()}
    assert (value["vllm:num_requests_running"], value["vllm:num_requests_waiting"]) == (3, 4)
    assert value["vllm:kv_cache_usage_perc"] == 0.25
    assert (value["vllm:prompt_tokens_total"], value["vllm:generation_tokens_total"]) == (6, 4)
    assert value["vllm:num_preemptions_total"] == 1
    assert (value["vllm:prefix_cache_queries_total"], value["vllm:prefix_cache_hits_total"]) == (40, 32)
    assert value["vllm:iteration_tokens_total_sum"] == 8
    reasons = {labels["finished_reason"]: count for labels, count in got["vllm:request_success_total"]}
    assert reasons == {"stop": 2, "length": 0, "abort": 1, "error": 0}
    metrics.unloaded("hu")
    assert picked(metrics)["vllm:request_success_total"] == got["vllm:request_success_total"], "no counter may fall"
    for ours, theirs in {
        "nr_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
        "nr_inter_token_seconds": "vllm:inter_token_latency_seconds",
        "nr_request_seconds": "vllm:e2e_request_latency_seconds",
        "nr_request_queue_seconds": "vllm:request_queue_time_seconds",
        "nr_request_prefill_seconds": "vllm:request_prefill_time_seconds",
        "nr_request_decode_seconds": "vllm:request_decode_time_seconds",
    }.items():
        assert value[f"{theirs}_count"] == 2
        assert value[f"{theirs}_sum"] == value[f"{ours}_sum"]
        assert [v for _, v in got[f"{theirs}_bucket"]] == [v for _, v in got[f"{ours}_bucket"]]


def test_the_gateway_reads_which_adapters_are_ready_and_which_are_waited_for():
    metrics = vllm_metrics()
    clock = RequestClock(metrics, Submit("r", (1,), Sampling(), adapters=("hu", "da"), selected="da+hu"))
    RequestClock(metrics, submit())
    adapters = (view("da", state="registered", slot=None), view("hu"), view("sk"), view("tr", state="loading"))
    [(labels, at)] = picked(metrics, *adapters)["vllm:lora_requests_info"]
    assert labels == {"max_lora": "8", "running_lora_adapters": "hu,sk", "waiting_lora_adapters": "da"}
    assert abs(at - time.time()) < 60
    clock.end("stop")
    [(labels, _)] = picked(metrics, *adapters)["vllm:lora_requests_info"]
    assert labels["waiting_lora_adapters"] == ""


def test_the_gateway_reads_the_size_of_the_cache():
    [(labels, value)] = picked(vllm_metrics())["vllm:cache_config_info"]
    assert value == 1
    assert (labels["block_size"], labels["num_gpu_blocks"]) == ("16", "100")


def test_the_metrics_page_names_all_of_vllms():
    families = text_string_to_metric_families(vllm_metrics().render(statistics(), ()).decode())
    shown = {f.name + "_total" * (f.type == "counter") for f in families if f.name.startswith("vllm:")}
    assert set(re.findall(r"`(vllm:\w+)`", (DOCS / "metrics.md").read_text(encoding="utf-8"))) == shown
