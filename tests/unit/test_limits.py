"""What one key, one body or one prompt may take of the server: 429 and 413."""

import asyncio
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from nr_serve.api.bridge import AsyncEngine
from nr_serve.api.context import Context
from nr_serve.api.middleware.limits import KeyLimits, TokenBucket
from nr_serve.api.request_state import CALLER
from nr_serve.api.worker import Worker
from nr_serve.config import ServeConfig
from nr_serve.errors import QueueFull
from nr_serve.keys import Key
from nr_serve.metrics import Metrics
from tests import fakes
from tests.fakes import serving
from tests.waiting import PATIENCE, until


class Clock:
    def __init__(self) -> None:
        self.seconds = 1e6

    def __call__(self) -> float:
        return self.seconds


class Asked:
    """`KeyLimits` over an app that answers 200, asked without a server."""

    def __init__(self, **config) -> None:
        self.clock = Clock()
        self._limits = KeyLimits(self._app, ServeConfig(**config), self.clock)

    async def _app(self, scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def __call__(self, key: Key | None = None, path="/v1/completions", method="POST") -> tuple[int, str | None]:
        """Status and Retry-After."""
        sent = []

        async def send(message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": [], "state": {"key": key}}
        asyncio.run(self._limits(scope, None, send))
        return sent[0]["status"], dict(sent[0]["headers"]).get(b"retry-after", b"").decode() or None


def key(name: str, **limits) -> Key:
    return Key(name=name, role="inference", sha256="0" * 64, **limits)


def test_a_bucket_holds_a_minute_and_fills_steadily():
    clock = Clock()
    bucket = TokenBucket(clock)
    assert [bucket.take(3) for _ in range(4)] == [0, 0, 0, pytest.approx(20)]
    clock.seconds += 19.9
    assert bucket.take(3) == pytest.approx(0.1)
    clock.seconds += 0.2
    assert bucket.take(3) == 0
    clock.seconds += 1e6
    assert [bucket.take(3) > 0 for _ in range(4)] == [False, False, False, True]


def test_a_bucket_of_less_than_one_a_minute_gives_one_in_its_time():
    clock = Clock()
    bucket = TokenBucket(clock)
    assert (bucket.take(0.5), bucket.take(0.5)) == (0, pytest.approx(120))
    clock.seconds += 121
    assert bucket.take(0.5) == 0


def test_each_key_has_a_rate_of_its_own_and_is_told_when_to_come_back():
    asked = Asked(key_requests_per_minute=2)
    slow, fast = key("slow", requests_per_minute=1), key("fast", requests_per_minute=5)
    assert [asked(slow) for _ in range(2)] == [(200, None), (429, "60")]
    assert [asked(fast)[0] for _ in range(6)] == [200] * 5 + [429]
    assert [asked(key("default"))[0] for _ in range(3)] == [200, 200, 429]
    assert [asked(None)[0] for _ in range(3)] == [200, 200, 429]
    asked.clock.seconds += 30.5
    assert (asked(slow), asked(None)[0]) == ((429, "30"), 200), "in 29.5 seconds"


def test_looking_and_changing_adapters_costs_nothing():
    asked = Asked(key_requests_per_minute=1)
    assert asked()[0] == 200
    for path, method in (("/v1/models", "GET"), ("/v1/adapters/x", "PUT"), ("/health", "GET"), ("/x", "POST")):
        assert asked(path=path, method=method)[0] == 200
    assert asked()[0] == asked(path="/tokenize")[0] == 429


def test_a_key_has_only_so_many_requests_under_way():
    with serving(key_requests_at_once=2) as served, ThreadPoolExecutor() as threads:
        served.engine.steps_may_run.clear()
        waiting = [threads.submit(served.complete) for _ in range(2)]
        until(lambda: len(served.engine.submits) == 2)
        response = served.complete()
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["type"] == "RateLimitError"
        assert served.http.get("/v1/models").status_code == 200
        served.engine.steps_may_run.set()
        assert [each.result(PATIENCE).status_code for each in waiting] == [200, 200]
        assert served.complete().status_code == 200
        assert served.complete(n=0).status_code == served.complete(n=0).status_code == 400
        assert served.complete().status_code == 200, "what was refused is under way no more"


def test_a_request_for_several_answers_counts_as_so_many():
    with serving(key_requests_at_once=3) as served, ThreadPoolExecutor() as threads:
        served.engine.steps_may_run.clear()
        waiting = threads.submit(served.complete, prompt=["a", "b"])
        until(lambda: len(served.engine.submits) == 2)
        assert served.complete(n=2).status_code == served.chat(n=2).status_code == 429
        assert served.complete(n=4).status_code == 400, "it could never be answered"
        assert len(served.engine.submits) == 2
        served.engine.steps_may_run.set()
        assert waiting.result(PATIENCE).status_code == 200
        assert served.complete(prompt=["a", "b", "c"]).status_code == served.chat(n=3).status_code == 200


@pytest.mark.parametrize(("secret", "status"), [("user", 403), ("root", 200)])
@pytest.mark.parametrize("asked", ["complete", "chat"])
def test_only_an_admin_goes_ahead_of_others(asked, secret, status):
    with serving(api_key="user", admin_key="root") as served:
        served.http.headers["authorization"] = f"Bearer {secret}"
        ask = getattr(served, asked)
        answer = ask(priority=-1)
        assert answer.status_code == status
        if status == 403:
            assert answer.json()["error"]["param"] == "priority"
        assert ask(priority=0).status_code == ask(priority=1).status_code == 200


def test_each_key_has_requests_under_way_of_its_own():
    may_end = asyncio.Event()

    async def app(scope, receive, send) -> None:
        await may_end.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    limits = KeyLimits(app, ServeConfig(key_requests_at_once=1))

    async def ask(of: Key | None) -> int:
        sent: asyncio.Queue = asyncio.Queue()
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "state": {"key": of}}
        await limits(scope, None, sent.put)
        return sent.get_nowait()["status"]

    async def main() -> tuple[list[int], list[int]]:
        one, two = key("one"), key("two", requests_at_once=2)
        under_way = [asyncio.create_task(ask(each)) for each in (None, one, two, two)]
        await asyncio.sleep(0)
        refused = [await ask(each) for each in (None, one, two)]
        may_end.set()
        return refused, await asyncio.gather(*under_way)

    assert asyncio.run(asyncio.wait_for(main(), PATIENCE)) == ([429] * 3, [200] * 4)


def test_the_largest_body_is_a_setting():
    with serving(max_body_mib=0.001) as served:
        body = json.dumps({"model": "base", "prompt": "x" * 2000}).encode()
        for content in (body, iter([body])):
            response = served.http.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            assert (response.status_code, response.json()["error"]["code"]) == (413, 413)
        assert served.complete().status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 4}, "n"),
        ({"prompt": ["a"] * 4}, "prompt"),
        ({"prompt": ["a", "b"], "n": 2}, "n"),
        ({"logprobs": 3}, "logprobs"),
        ({"prompt_logprobs": 3}, "prompt_logprobs"),
    ],
)
def test_the_most_answers_and_logprobs_are_settings(body, param):
    with serving(max_answers=3, max_logprobs=2) as served:
        answer = served.complete(**body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert served.complete(n=3, logprobs=2).status_code == 200
        assert served.chat(logprobs=True, top_logprobs=3).json()["error"]["param"] == "top_logprobs"
        assert served.chat(logprobs=True, top_logprobs=2).status_code == 200


def test_more_answers_than_can_be_queued_are_wrong_rather_than_too_early():
    with serving(max_answers=9, max_waiting=3) as served:
        answer = served.complete(n=4)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


def http_errors(served) -> dict[tuple[str, str], float]:
    """How many errors the metrics count, by status and type."""
    found = re.findall(r'nr_http_errors_total{status="(.+)",type="(.+)"} (.+)', served.http.get("/metrics").text)
    return {(status, kind): float(count) for status, kind, count in found}


def test_every_refusal_is_counted_by_its_status_and_type():
    with serving(key_requests_per_minute=2, max_body_mib=0.01, api_key="user") as served:
        served.http.headers["authorization"] = "Bearer user"
        assert served.complete(prompt="x" * 20_000).status_code == 413
        assert served.complete(n=0).status_code == 400
        assert served.complete().status_code == served.complete().status_code == 429
        assert served.http.get("/v1/adapters/x").status_code == served.http.get("/x").status_code == 404
        assert served.http.get("/v1/models").status_code == 200
        served.http.headers["authorization"] = "Bearer nobody"
        assert served.complete().status_code == 401
        assert http_errors(served) == {
            ("413", "RequestTooLargeError"): 1,
            ("400", "BadRequestError"): 1,
            ("429", "RateLimitError"): 2,
            ("404", "NotFoundError"): 2,
            ("401", "AuthenticationError"): 1,
        }


def test_a_client_that_goes_while_it_sends_its_body_is_no_error(caplog):
    caplog.set_level("INFO", "nr_serve.api.middleware.access_log")
    with serving() as served:
        address = urlsplit(served.url)
        with socket.create_connection((address.hostname, address.port)) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        until(lambda: [record for record in caplog.records if record.getMessage() == "request"])
        assert next(each.fields["status"] for each in caplog.records if each.getMessage() == "request") == 499
        assert http_errors(served) == {}


def test_a_bug_is_counted_and_a_probe_of_a_server_that_is_not_ready_is_not():
    with serving() as served:
        served.engine.submit = None
        assert served.complete().status_code == 500
        served.engine.fail("broken")
        served.until("/ready", 503)
        assert served.complete().status_code == 503
        assert http_errors(served) == {("500", "InternalServerError"): 1, ("503", "ServiceUnavailableError"): 1}


def test_callers_are_told_apart_by_key_or_by_address_where_they_take_turns(monkeypatch):
    callers, turn = [], Worker.turn

    def noting(self, what):
        callers.append(CALLER.get())
        return turn(self, what)

    monkeypatch.setattr(Worker, "turn", noting)
    with serving(admin_key="root") as served:
        assert served.complete().status_code == 200
        served.http.headers["authorization"] = "Bearer root"
        assert served.complete().status_code == 200
    assert callers == ["[127.0.0.1]", "admin-key"]


def test_only_so_many_texts_wait_for_the_tokenizer():
    async def ask() -> None:
        engine = AsyncEngine(fakes.FakeEngine, Metrics())
        context = Context(engine, fakes.tokenizer(), ServeConfig(max_waiting=2))
        go_on = asyncio.Event()
        loop = asyncio.get_running_loop()
        held = [
            asyncio.create_task(context.text(lambda: asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()))
            for _ in range(2)
        ]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await context.text(lambda: None)
        CALLER.set("another")
        others = asyncio.create_task(context.text(lambda: "read"))
        await asyncio.sleep(0)
        go_on.set()
        assert await others == "read", "each caller has places of its own"
        await asyncio.gather(*held)
        CALLER.set("")
        assert await context.text(lambda: "read") == "read"

    asyncio.run(ask())


def test_callers_take_turns_at_a_worker_whoever_waits_longest():
    done = []

    async def work(worker: Worker, caller: str) -> None:
        CALLER.set(caller)
        async with worker.turn("x"):
            await worker.run(lambda: done.append(caller))

    async def ask() -> None:
        worker = Worker("x", 9)
        callers = ["a", "a", "a", "a", "b", "b", "c"]
        tasks = [asyncio.create_task(work(worker, caller)) for caller in callers]
        await asyncio.sleep(0)
        tasks[2].cancel()  # while it waits
        await asyncio.gather(*tasks, return_exceptions=True)
        assert done == ["a", "a", "b", "c", "b", "a"]
        done.clear()
        await asyncio.wait_for(work(worker, "a"), 10)
        assert done == ["a"]
        assert not worker._asked, "whoever asks nothing is forgotten: without keys there is a caller an address"

    asyncio.run(ask())
