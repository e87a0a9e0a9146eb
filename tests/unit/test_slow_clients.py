"""Clients that do not read their answers, over real sockets."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nr_serve.api.middleware import deadlines
from nr_serve.serve import HttpServer
from tests import tiny
from tests.fakes import events
from tests.unit.servers import Loop, running
from tests.waiting import PATIENCE, until

BODY = {"model": "tiny", "prompt": "hello there", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
BODY |= {"stream": True, "logprobs": 20, "return_token_ids": True}
SMALL = 4096  # bytes of a socket's buffer
ENOUGH = 150  # tokens, each a chunk of 1 KiB or more: far more than the sockets and uvicorn hold


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A server over the real engine, whose sockets hold little."""
    folder = tiny.save(tiny.model(), tmp_path / "tiny")
    run = HttpServer.run

    def run_with_small_buffers(self, sockets):
        sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)  # those it accepts inherit it
        run(self, sockets)

    monkeypatch.setattr(HttpServer, "run", run_with_small_buffers)
    with running(lambda deliver: Loop(folder, deliver), tiny.tokenizer()) as (served, _):
        yield served


def deaf(address: tuple[str, int]) -> socket.socket:
    """A client that asks for a stream and never reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    client.connect(address)
    body = json.dumps(BODY).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    return client


def stream(served) -> list[int]:
    """A client that reads: the tokens of its stream."""
    answer = served.http.post("/v1/completions", json=BODY, timeout=PATIENCE)
    return [i for chunk in events(answer) for choice in chunk["choices"] for i in choice["token_ids"]]


def test_a_client_that_never_reads_loses_its_request_and_no_other_stream_notices(real, monkeypatch):
    monkeypatch.setattr(deadlines, "SEND_SECONDS", 2.0)
    alone = stream(real)
    assert len(alone) == BODY["max_tokens"]
    submits, aborted = [], threading.Event()
    submit, abort = real.engine.submit, real.engine.abort
    monkeypatch.setattr(real.engine, "submit", lambda request: (submit(request), submits.append(request)))
    monkeypatch.setattr(real.engine, "abort", lambda request_id: (abort(request_id), aborted.set()))
    core, begin = real.engine.core, real.engine.hold(step=1)
    host, port = real.url.removeprefix("http://").split(":")
    with deaf((host, int(port))), ThreadPoolExecutor() as threads:
        until(lambda: len(submits) == 1)
        reads = threads.submit(stream, real)
        until(lambda: len(submits) == 2)
        go_on = real.engine.hold(step=ENOUGH)
        begin.set()
        assert aborted.wait(PATIENCE), "a client that takes nothing is given up"
        assert core.scheduler.pool.used > 0, "the engine stands in the middle of both answers"
        go_on.set()
        assert reads.result(PATIENCE) == alone
        until(lambda: core.idle)
        assert core.scheduler.pool.used == 0
    assert stream(real) == alone
