"""Deadlines, draining, signals, and an engine that breaks down: everybody is answered, nothing is left behind."""

import asyncio
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from nr_serve.api.bridge import AsyncEngine
from nr_serve.api.middleware import deadlines
from nr_serve.api.middleware.deadlines import Deadlines
from nr_serve.api.underway import Underway
from nr_serve.config import ServeConfig
from nr_serve.engine.core import MAX_FAILED_STEPS
from nr_serve.engine.messages import LoadAdapter, Output, Sampling, StepEvents, Submit
from nr_serve.errors import NrError
from nr_serve.metrics import Metrics
from nr_serve.serve import HttpServer, serve
from tests import fakes, tiny
from tests.fakes import events, serving
from tests.unit.halting import Halting
from tests.unit.servers import Loop, process, running
from tests.waiting import PATIENCE, until

BODY = {"model": "base", "prompt": "hi", "max_tokens": 5, "stream": True}


def ask(served, *, stream=False, timeout: str | None = None) -> httpx.Response:
    headers = {} if timeout is None else {"X-Request-Timeout": timeout}
    return served.http.post("/v1/completions", json=BODY | {"stream": stream}, headers=headers, timeout=PATIENCE)


def last_error(response: httpx.Response) -> dict:
    """The error that ends a stream."""
    return json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]


@pytest.mark.parametrize(
    ("config", "header"), [({"request_timeout": 0.2}, None), ({}, "0.2"), ({"request_timeout": 900}, "0.2")]
)
def test_a_request_that_takes_too_long_is_aborted_with_504(config, header):
    with serving(**config) as served:
        served.engine.steps_may_run.clear()
        for stream in (False, True):
            answer = ask(served, stream=stream, timeout=header)
            assert (answer.status_code, answer.json()["error"]["type"]) == (504, "TimeoutError")
        assert len(served.engine.submits) == 2
        assert served.engine.aborted == [submit.request_id for submit in served.engine.submits]
        served.engine.steps_may_run.set()
        assert served.http.get("/v1/models").status_code == 200
        assert "nr_requests_in_flight 0.0" in served.http.get("/metrics").text


def test_a_client_cannot_lengthen_the_limit():
    with serving(request_timeout=0.2) as served:
        served.engine.steps_may_run.clear()
        assert ask(served, timeout="900").status_code == 504


def test_a_stream_that_takes_too_long_ends_with_an_error():
    with running(Halting, fakes.tokenizer()) as (served, _):
        answer = ask(served, stream=True, timeout="3")
        assert answer.status_code == 200
        assert answer.text.count("data: ") == 3
        assert (last_error(answer)["code"], last_error(answer)["type"]) == (504, "TimeoutError")
        assert len(served.engine.aborted) == 1


def sent_by(app, timeout_s: float | None = None, then=None) -> list[dict]:
    """What `Deadlines` over `app` sends; `then(underway)` runs once the request has begun."""
    sent, underway = [], Underway()

    async def send(message) -> None:
        sent.append(message)

    async def main() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        request = asyncio.create_task(Deadlines(app, underway, timeout_s)(scope, None, send))
        await asyncio.sleep(0)
        if then is not None:
            await then(underway)
        await request

    asyncio.run(main())
    return sent


def test_a_request_that_ends_in_the_turn_of_the_drain_does_not_disturb_it():
    may_end, drained = asyncio.Event(), []

    async def app(scope, receive, send) -> None:
        await may_end.wait()

    async def end_and_drain(underway) -> None:
        may_end.set()  # wakes the request's task before the drain begins; its callbacks run a turn later
        await asyncio.create_task(underway.drain(PATIENCE))
        drained.append(underway.draining)

    sent_by(app, then=end_and_drain)
    assert drained == [True]


def test_a_request_that_has_not_arrived_is_refused_as_soon_as_the_drain_begins():
    sent, underway = [], Underway()

    async def app(scope, receive, send) -> None:
        while (await receive())["more_body"]:
            pass

    async def send(message) -> None:
        sent.append(message)

    async def main() -> None:
        parts = asyncio.Queue()
        parts.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
        scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        scope["headers"] = [(b"content-length", b"100")]
        request = asyncio.create_task(Deadlines(app, underway, None)(scope, parts.get, send))
        while not parts.empty():
            await asyncio.sleep(0)
        await asyncio.wait_for(underway.drain(grace_s=1e6), PATIENCE)
        await request

    asyncio.run(main())
    assert sent[0]["status"] == 503


@pytest.mark.parametrize("more", [True, False])
def test_only_a_stream_that_is_not_whole_is_ended_by_the_deadline(more):
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
    part = {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": more}

    async def app(scope, receive, send) -> None:
        await send(start)
        await send(part)
        await asyncio.Event().wait()

    sent = sent_by(app, timeout_s=0.01)
    assert sent[:2] == [start, part]
    assert [b"TimeoutError" in last["body"] for last in sent[2:]] == ([True] if more else [])


async def _blocked(message) -> None:
    """To a client that does not read."""
    await asyncio.Event().wait()


async def _streaming(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    while True:
        await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})


@pytest.mark.parametrize(("deadline", "blocked_s"), [(0.01, PATIENCE), (None, 0.01)])
def test_a_client_that_does_not_read_keeps_its_request_no_longer_than_its_time(deadline, blocked_s, monkeypatch):
    monkeypatch.setattr(deadlines, "SEND_SECONDS", blocked_s)
    monkeypatch.setattr(deadlines, "_LAST_SECONDS", 0.01)

    async def main() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await asyncio.wait_for(Deadlines(_streaming, Underway(), deadline)(scope, None, _blocked), PATIENCE)

    asyncio.run(main())


@pytest.mark.parametrize("header", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_timeout_that_is_none_is_refused_by_name(header):
    with serving() as served:
        answer = ask(served, timeout=header)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Request-Timeout")


@pytest.fixture
def real(tmp_path):
    """A server over the real engine with a tiny base."""
    folder = tiny.save(tiny.model(), tmp_path / "tiny")
    with running(lambda deliver: Loop(folder, deliver), tiny.tokenizer()) as (served, _):
        yield served


def complete(served, *, stream=False, tokens=100, timeout="900") -> httpx.Response:
    # Greedy: a drawn answer may begin with half a character, and a stream has nothing to send of that yet.
    body = {"model": "tiny", "prompt": "hello there", "max_tokens": tokens, "temperature": 0, "stream": stream}
    body["ignore_eos"] = True
    headers = {"X-Request-Timeout": timeout}
    return served.http.post("/v1/completions", json=body, headers=headers, timeout=PATIENCE)


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_timed_out_request_held_comes_back(real, stream):
    core = real.engine.core
    go_on = real.engine.hold(step=3)
    answer = complete(real, stream=stream, timeout="3")
    assert (last_error(answer)["code"] if stream else answer.status_code) == 504
    assert core.scheduler.pool.used > 0, "the engine stands in the middle of it"
    go_on.set()
    until(lambda: core.idle)
    assert core.scheduler.pool.used == 0
    assert complete(real, tokens=2).status_code == 200


def test_an_engine_that_breaks_down_answers_everybody_with_500_and_turns_health_red(real):
    def breaks():
        raise RuntimeError("/secret/path: pages are lost")

    go_on = real.engine.hold(step=3, then=breaks)
    with ThreadPoolExecutor() as threads:
        streams = [threads.submit(complete, real, stream=True)]
        assert real.engine.standing.wait(PATIENCE), "else it takes what is asked before it stands"
        assert real.engine.core.scheduler.running
        asked = [threads.submit(complete, real) for _ in range(4)]
        listed = threads.submit(real.http.get, "/v1/adapters", timeout=PATIENCE)
        until(lambda: real.engine._inbox.qsize() >= 5)
        assert real.http.get("/health").status_code == 200
        go_on.set()
        answers = [each.result(PATIENCE) for each in (*asked, listed)]
        (stream,) = [each.result(PATIENCE) for each in streams]
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
    assert (stream.status_code, last_error(stream)["code"]) == (200, 500)
    health = real.until("/health", 503)
    after = complete(real)
    assert after.status_code == 503
    for answer in (*answers, stream, health, after, real.until("/ready", 503)):
        assert "secret" not in answer.text
        assert "lost" not in answer.text


def test_an_engine_that_cannot_be_watched_counts_as_failed(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("a bug")

    async def main() -> str:
        engine = AsyncEngine(fakes.FakeEngine, Metrics())
        monkeypatch.setattr(engine, "_note", broken)
        async with engine.running(), asyncio.timeout(PATIENCE):
            while engine.status == "loading":
                await asyncio.sleep(0)
        return engine.status

    assert asyncio.run(main()) == "failed"
    assert "a bug" in caplog.text


def test_what_a_step_gave_a_request_that_is_gone_takes_nothing_from_the_others():
    async def main() -> str:
        fake: list[fakes.FakeEngine] = []
        engine = AsyncEngine(lambda deliver: fake.append(fakes.FakeEngine(deliver)) or fake[0], Metrics())
        async with engine.running(), asyncio.timeout(PATIENCE):
            while engine.status == "loading":
                await asyncio.sleep(0)
            fake[0].steps_may_run.clear()
            answer = asyncio.create_task(anext(engine.generate([Submit("r", (1,), Sampling())])))
            await asyncio.sleep(0)
            fake[0].deliver(StepEvents((Output("gone", text="x"), Output("r", text="y"))))
            return (await answer).text

    assert asyncio.run(main()) == "y"


def test_steps_that_fail_one_after_the_other_end_the_engine_and_everybody_is_answered(real, monkeypatch):
    def lost(*args):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(real.engine.core._runner, "run", lost)
    answers = [complete(real) for _ in range(MAX_FAILED_STEPS)]
    assert [answer.status_code for answer in answers] == [500] * MAX_FAILED_STEPS
    real.until("/health", 503)
    assert complete(real).status_code == complete(real, stream=True).status_code == 503


def test_told_to_end_it_refuses_what_is_new_and_finishes_what_runs():
    with running(Halting, fakes.tokenizer()) as (served, server), ThreadPoolExecutor() as threads:
        stream = threads.submit(ask, served, stream=True)
        until(lambda: served.engine.submits)
        server.handle_exit(signal.SIGTERM, None)
        assert served.until("/ready", 503).json()["error"]["message"] == "the server is shutting down"
        assert served.http.get("/health").json() == {"status": "draining"}
        assert "\nnr_ready 0.0\n" in served.http.get("/metrics").text
        for answer in (ask(served), ask(served, stream=True), served.http.put("/v1/adapters/x", content=b"good")):
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "ServiceUnavailableError")
        served.engine.may_go_on.set()
        answer = stream.result(PATIENCE)
        assert events(answer)[-1]["choices"][0]["finish_reason"] == "length"


def test_what_does_not_finish_within_the_grace_period_is_ended_with_an_error():
    config = {"grace_period": 0.5}
    with running(Halting, fakes.tokenizer(), **config) as (served, server), ThreadPoolExecutor() as threads:
        stream, whole = threads.submit(ask, served, stream=True), threads.submit(ask, served)
        until(lambda: len(served.engine.submits) == 2)
        server.handle_exit(signal.SIGTERM, None)
        assert last_error(stream.result(PATIENCE))["code"] == 503
        assert whole.result(PATIENCE).status_code == 503
        assert len(served.engine.aborted) == 2


def test_an_upload_stays_until_the_engine_has_read_it_though_its_request_is_ended():
    config = {"grace_period": 0.2}
    with (
        running(fakes.FakeEngine, fakes.tokenizer(), **config) as (served, server),
        ThreadPoolExecutor() as threads,
    ):
        engine = served.engine
        engine.steps_may_run.clear()
        answer = threads.submit(ask, served)
        until(lambda: engine._running)
        upload = threads.submit(served.http.put, "/v1/adapters/da", content=b"good", timeout=PATIENCE)
        until(lambda: any(isinstance(command, LoadAdapter) for command in engine.commands))
        server.handle_exit(signal.SIGTERM, None)
        assert upload.result(PATIENCE).status_code == answer.result(PATIENCE).status_code == 503
    assert engine.adapters["da"].version == b"good".hex()
    assert not engine.last_load().path.parent.exists()


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_told_to_end_the_process_ends_once_its_streams_have_and_the_log_says_so(sig, code):
    with process("--grace-period", "0.5") as (server, client):
        with client.http.stream("POST", "/v1/completions", json=BODY, timeout=PATIENCE) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(sig)
            assert "shutting down" in "".join(lines)
        assert server.wait(PATIENCE) == code
        said = [line for line in server.stderr.read().splitlines() if " nr_serve.serve: " in line]
    assert [line.split(maxsplit=2)[2] for line in said[-2:]] == [  # behind date and time
        f"INFO nr_serve.serve: stopping on {sig.name}: running requests: 1, grace: 0.5 s",
        "INFO nr_serve.serve: stopped",
    ]


def test_what_was_loaded_is_left_out_of_later_garbage_collections():
    code = """
import atexit, gc, os, signal
from nr_serve import serve
from tests.unit import halting
atexit.register(lambda: print(gc.get_freeze_count()))
def ready(self):
    print(gc.get_freeze_count())
    os.kill(os.getpid(), signal.SIGTERM)
serve._Announcer._say_ready = ready
halting.main(["--port", "0"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    at_work, at_the_end = map(int, done.stdout.split())
    assert at_work > 10_000, done.stderr
    assert at_the_end == 0, "extension modules report what is left at the end as leaked"


def test_sigterm_ends_a_process_that_loads_its_base_at_once_with_0():
    with process("loading", until_it_is="loading") as (server, _):
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
        assert server.stderr.read().endswith(" INFO nr_serve.serve: stopped\n")


def test_a_server_whose_engine_failed_ends_with_an_error(monkeypatch):
    def run(server, sockets):
        engine.failure = "the device is lost"
        engine.on_status("ready")
        engine.on_status("failed")
        raise SystemExit(0)  # as SIGTERM does

    engine = SimpleNamespace(failure=None, info=SimpleNamespace(model="m", device="d", dtype="t"), adapters={})
    engine.status = "ready"
    app = SimpleNamespace(state=SimpleNamespace(context=SimpleNamespace(underway=Underway(), engine=engine)))
    monkeypatch.setattr("nr_serve.serve.assemble", lambda config: (engine, app))
    monkeypatch.setattr(HttpServer, "run", run)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(NrError, match="the device is lost"):
        serve(ServeConfig(port=0))


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(second):
    with (
        process("--grace-period", "100000") as (server, client),
        client.http.stream("POST", "/v1/completions", json=BODY, timeout=PATIENCE) as stream,
    ):
        lines = stream.iter_lines()  # kept: httpx closes the connection with it
        next(lines)
        server.send_signal(signal.SIGTERM)
        client.until("/ready", 503)
        server.send_signal(second)
        assert server.wait(PATIENCE) == 128 + second


def test_a_second_server_on_the_port_fails_before_it_loads_anything():
    with process() as (_, client):
        port = client.url.rpartition(":")[2]
        command = [sys.executable, "-m", "nr_serve.cli", "serve", "--port", port, "--model", "/no/such"]
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 1
        assert "Address already in use" in second.stderr
        assert "no model folder" not in second.stderr
        assert client.http.get("/ready").status_code == 200
