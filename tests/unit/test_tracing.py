"""Traces, as an exporter gets them from a server over the fake engine."""

import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from nr_serve.api.app import create_app
from nr_serve.api.bridge import AsyncEngine
from nr_serve.config import ServeConfig
from nr_serve.errors import NrError
from nr_serve.metrics import Metrics
from nr_serve.tracing import Tracing
from tests.collector import collecting
from tests.fakes import FakeEngine, tokenizer
from tests.unit.test_imports import BLOCK
from tests.waiting import PATIENCE, until

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class TimedEngine(FakeEngine):
    """Says when a request's first step began."""

    def _advance(self, submit, written, text):
        return replace(super()._advance(submit, written, text), started=time.monotonic())


@contextmanager
def traced(exporter=None, tracing=None):
    """A client of a server, its engine, and the list that holds the spans once the block is left."""
    exporter = exporter or InMemorySpanExporter()
    engines, spans = [], []

    def build(deliver):
        engines.append(TimedEngine(deliver))
        return engines[0]

    engine = AsyncEngine(build, Metrics(), tracing or Tracing(exporter))
    with TestClient(create_app(engine, tokenizer(), ServeConfig()), "http://localhost") as client:
        until(lambda: client.get("/ready").status_code == 200)
        yield client, engines[0], spans
    if isinstance(exporter, InMemorySpanExporter):
        spans += exporter.get_finished_spans()


def complete(client, *, headers=None, **body):
    return client.post("/v1/completions", json={"model": "base", "prompt": "hi"} | body, headers=headers)


def whole(spans):
    """The one span that is no phase of another, and the phases by name."""
    (request,) = (span for span in spans if span.kind is SpanKind.SERVER)
    return request, {span.name: span for span in spans if span is not request}


def test_a_request_is_one_span_with_queue_prefill_and_decode_in_it():
    with traced() as (client, _, spans):
        complete(client, max_tokens=3, temperature=0.5, top_k=7, seed=11)
    request, phases = whole(spans)
    assert request.name == "text_completion base"
    assert request.parent is None
    assert list(phases) == ["queue", "prefill", "decode"]
    edges = [time for phase in phases.values() for time in (phase.start_time, phase.end_time)]
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (request.start_time, request.end_time)
    assert edges[1::2][:-1] == edges[2::2], "one begins where the last ended"
    assert {phase.parent.span_id for phase in phases.values()} == {request.context.span_id}
    got = dict(request.attributes)
    assert got["gen_ai.operation.name"] == "text_completion"
    assert got["gen_ai.request.model"] == "base"
    assert (got["gen_ai.usage.input_tokens"], got["gen_ai.usage.output_tokens"]) == (3, 3)
    assert got["gen_ai.response.finish_reasons"] == ("length",)
    assert (got["gen_ai.request.max_tokens"], got["gen_ai.request.temperature"]) == (3, 0.5)
    assert (got["gen_ai.request.top_k"], got["gen_ai.request.seed"]) == (7, 11)
    assert 0 < got["gen_ai.response.time_to_first_chunk"] < 60
    assert request.resource.attributes["service.name"] == "nr-serve"


def test_attributes_are_those_of_the_conventions():
    conventions = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    with traced() as (client, _, spans):
        complete(client, top_k=7, seed=11, frequency_penalty=1)
    request, _ = whole(spans)
    assert {name for name in request.attributes if name.startswith("gen_ai.")} <= conventions
    assert {name for name in request.attributes if not name.startswith("gen_ai.")} == {"nr.request_id"}


def test_the_answers_id_and_the_adapters_chosen_are_said():
    with traced() as (client, _, spans):
        answer = complete(client, model="hu").json()
    request, _ = whole(spans)
    assert request.name == "text_completion hu"
    assert request.attributes["nr.request_id"].startswith(answer["id"])
    assert request.attributes["nr.adapters"] == ("hu",)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_child_of_its_callers_span(stream):
    with traced() as (client, _, spans):
        complete(client, stream=stream, headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
        complete(client)
    child, root = (span for span in spans if span.kind is SpanKind.SERVER)
    assert f"{child.context.trace_id:032x}" == TRACE
    assert f"{child.parent.span_id:016x}" == CALLER
    assert root.parent is None, "the next request has its own"


def test_what_the_caller_does_not_sample_is_not_sent():
    with traced() as (client, _, spans):
        complete(client, headers={"traceparent": f"00-{TRACE}-{CALLER}-00"})
    assert spans == []


def test_each_of_several_answers_has_its_span():
    with traced() as (client, _, spans):
        body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "n": 2, "max_tokens": 2}
        client.post("/v1/chat/completions", json=body)
    requests = [span for span in spans if span.kind is SpanKind.SERVER]
    assert [span.name for span in requests] == ["chat base"] * 2
    assert len({span.attributes["nr.request_id"] for span in requests}) == 2


def test_an_error_marks_the_span():
    with traced() as (client, engine, spans):
        engine.error[1] = NrError("the step failed")
        assert complete(client, max_tokens=3).status_code == 500
    request, phases = whole(spans)
    assert request.status.status_code is StatusCode.ERROR
    assert request.attributes["error.type"] == "InternalServerError"
    assert request.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert "decode" in phases


def test_what_waited_in_vain_has_a_queue_and_no_more():
    with traced() as (client, engine, spans):
        engine.error[0] = NrError("refused")
        complete(client)
    _, phases = whole(spans)
    assert list(phases) == ["queue"]


def test_no_text_of_a_request_is_in_its_spans():
    with traced() as (client, engine, spans):
        engine.error[2] = NrError("cannot do sesame")
        complete(client, prompt="open sesame", stop=["sesame!"], user="sesame")
        complete(client, prompt="open sesame", stop=["sesame!"], user="sesame")
    assert len([span for span in spans if span.kind is SpanKind.SERVER]) == 2
    for span in spans:
        assert "sesame" not in span.to_json()


def test_traces_go_to_the_collector():
    with collecting() as collector:
        with traced(tracing=Tracing.to_collector(collector.url + "/")) as (client, _, _):
            complete(client)
        assert sorted(collector.spans) == ["decode", "prefill", "queue", "text_completion base"]


def test_nothing_of_it_is_imported_while_it_is_off():
    program = """
import sys
from tests.fakes import serving
import nr_serve.serve
with serving() as server:
    assert server.complete(max_tokens=2).status_code == 200
own = ("nr_serve.tracing", "opentelemetry.sdk", "opentelemetry.exporter")  # FastAPI imports opentelemetry-api
assert not [name for name in sys.modules if name.startswith(own)]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_is_named():
    program = 'blocked = {"opentelemetry"}' + BLOCK.replace("raise ImportError(", "raise ModuleNotFoundError(")
    command = [sys.executable, "-c", program + "import nr_serve.tracing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert "nr_serve.errors.NrError: tracing needs" in done.stderr
    assert "of the extra `otel`" in done.stderr
