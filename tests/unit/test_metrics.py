import re
import time

from nr_serve.engine.messages import Output, Sampling, StepReport, Submit, Token
from nr_serve.metrics import Metrics
from tests.fakes import serving, view

GATES = {"nr_gate_fired_total", "nr_gate_seen_total", "nr_gate_mass_total", "nr_cross_fired_total"}
REQUESTS = {
    "nr_requests_total", "nr_requests_in_flight", "nr_requests_running", "nr_requests_waiting",
    "nr_prompt_tokens_total", "nr_generated_tokens_total", "nr_preemptions_total", "nr_time_to_first_token_seconds",
    "nr_inter_token_seconds", "nr_request_seconds", "nr_step_seconds", "nr_step_tokens", "nr_step_requests",
    "nr_computed_tokens_total", "nr_pages_used", "nr_pages_total",
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


def test_a_request_is_timed_and_its_tokens_counted():
    metrics = Metrics()
    clock = metrics.track(submit())
    assert samples(metrics)["nr_requests_in_flight"] == 1
    clock.output(Output("r", tokens=(Token(1, "a"),)))
    clock.output(Output("r", tokens=(Token(1, "a"), Token(2, "b")), finish_reason="stop"))
    got = samples(metrics)
    assert got['nr_requests_total{finish_reason="stop",selected="base"}'] == 1
    assert got["nr_requests_in_flight"] == 0
    assert (got["nr_prompt_tokens_total"], got["nr_generated_tokens_total"]) == (3, 3)
    assert got["nr_time_to_first_token_seconds_count"] == got["nr_request_seconds_count"] == 1
    assert got["nr_inter_token_seconds_count"] == 2


def test_a_refused_request_is_counted_but_not_timed():
    metrics = Metrics()
    metrics.track(submit()).output(Output("r", finish_reason="error"))
    got = samples(metrics)
    assert got['nr_requests_total{finish_reason="error",selected="base"}'] == 1
    assert got["nr_request_seconds_count"] == got["nr_prompt_tokens_total"] == 0


def test_a_step_sets_the_gauges_and_adds_to_the_counters():
    metrics = Metrics()
    for step in (1, 2):
        metrics.step(StepReport(step, 0.1, 5, 3, 4, 6, 7, 1, 10, 100))
    got = samples(metrics)
    assert (got["nr_requests_running"], got["nr_requests_waiting"], got["nr_preemptions_total"]) == (6, 7, 2)
    assert (got["nr_pages_used"], got["nr_pages_total"]) == (10, 100)
    assert (got["nr_step_tokens_sum"], got["nr_step_requests_sum"], got["nr_step_seconds_count"]) == (16, 8, 2)
    assert got['nr_computed_tokens_total{kind="prefill"}'] == 10


def test_an_unloaded_adapter_leaves_no_label_behind():
    metrics = Metrics()
    metrics.track(Submit("r", (1,), Sampling(), selected="hu")).end("stop")
    metrics.loaded(view("hu"))
    assert 'selected="hu"' in metrics.render(None, ()).decode()
    metrics.unloaded("hu")
    assert 'selected="hu"' not in metrics.render(None, ()).decode()
    assert samples(metrics)["nr_adapter_unloads_total"] == 1


def test_an_adapter_that_was_not_measured_has_no_leak():
    text = Metrics().render(None, (view("hu", neutrality=None),)).decode()
    assert 'nr_adapter_bytes{adapter="hu"}' in text
    assert "nr_adapter_leak_ratio{" not in text


def test_joined_selections_go_with_each_adapter_in_them_and_only_so_many_are_told_apart():
    metrics = Metrics()
    for selected in ("base", "da+hu", "sk"):
        metrics.track(Submit("r", (1,), Sampling(), selected=selected)).end("stop")
    metrics.unloaded("hu")
    text = metrics.render(None, ()).decode()
    assert "da+hu" not in text
    assert 'selected="sk"' in text
    for i in range(1000):
        metrics.track(Submit("r", (1,), Sampling(), selected=f"da+x{i}")).end("stop")
    metrics.track(submit()).end("stop")
    got = {name: value for name, value in samples(metrics).items() if name.startswith("nr_requests_total")}
    assert len(got) < 100
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
    assert got["nr_adapter_loads_total"] == 2  # one was there at the start
    assert got["nr_adapter_unloads_total"] == got["nr_adapter_load_failures_total"] == 1
    assert got['nr_gate_fired_total{adapter="da",layer_group="0-1"}'] == 3
    assert got['nr_gate_mass_total{adapter="da"}'] == 2.5
    assert got['nr_cross_fired_total{adapter="hu",selected="base"}'] == 4
    assert got['nr_adapter_bytes{adapter="da"}'] == 1000
    leaks = {name: value for name, value in got.items() if name.startswith("nr_adapter_leak_ratio")}
    assert leaks == {
        'nr_adapter_leak_ratio{adapter="da",probe="prose"}': 0.0025,
        'nr_adapter_leak_ratio{adapter="da",probe="code"}': 0.0075,
    }, "of registered adapters only"
    for line in text.splitlines():
        if line.startswith("# HELP nr_"):
            assert len(line.split(" ", 3)[3]) > 5


def test_metrics_do_not_wait_for_an_engine_that_loads():
    with serving(loading=True) as server:
        started = time.monotonic()
        assert "nr_slots_used" not in server.http.get("/metrics").text
        assert time.monotonic() - started < 2
