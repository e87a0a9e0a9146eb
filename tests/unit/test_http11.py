"""What reaches the server below HTTP, over real sockets: no HTTP, half of a request, two lengths of one body."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from nr_serve.api import http11
from tests import fakes
from tests.fakes import FakeEngine
from tests.unit.servers import running
from tests.waiting import PATIENCE, until

GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PUT = b"PUT /v1/adapters/x HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server():
    with running(FakeEngine, fakes.tokenizer()) as (served, _):
        yield served


def connect(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), PATIENCE)


def sent(server, *parts: bytes) -> tuple[int, dict, bytes]:
    """What the server answers until it closes: status, the error, the head."""
    with closing(connect(server)) as client:
        for part in parts:
            client.sendall(part)
        answer = b""
        while more := client.recv(2**16):
            answer += more
    head, body = answer.split(b"\r\n\r\n", 1)
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error, head.lower()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(90) + b"\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /a b HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",  # no Host
        GET + b"a\0b: c\r\n\r\n",
        GET + "hü: x\r\n\r\n".encode(),
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        POST + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_apis_form(server, data):
    status, error, head = sent(server, data)
    assert (status, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert b"connection: close" in head
    assert server.complete().status_code == 200


def test_a_head_without_end_is_refused(server):
    assert sent(server, GET + b"X: " + b"a" * 70_000)[0] == 400


def test_a_body_with_two_lengths_is_refused_and_nothing_after_it_is_read(server):
    smuggled = b"0\r\n\r\n" + GET + b"\r\n"
    status, error, head = sent(server, POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + smuggled)
    assert (status, error["message"]) == (400, "a body has either Content-Length or Transfer-Encoding")
    assert b"connection: close" in head


@pytest.mark.parametrize(
    "part", [GET, POST + b"Content-Length: 50\r\n\r\n{", PUT + b"Content-Length: 9\r\n\r\ngood"]
)
def test_a_request_that_stops_half_way_is_ended_with_408(server, part, monkeypatch):
    monkeypatch.setattr(http11, "READ_SECONDS", 0.2)
    status, error, _ = sent(server, part[:9], part[9:])
    assert (status, error["type"]) == (408, "TimeoutError")
    assert server.complete().status_code == 200
    assert all(adapter["name"] == "hu" for adapter in server.http.get("/v1/adapters").json()["data"])


def test_a_connection_that_asks_nothing_is_closed_without_a_word(server, monkeypatch):
    monkeypatch.setattr(http11, "READ_SECONDS", 0.2)
    with closing(connect(server)) as client:
        assert client.recv(1) == b""


def test_a_head_in_drops_has_no_more_time_than_another(server, monkeypatch):
    monkeypatch.setattr(http11, "READ_SECONDS", 0.2)
    with closing(connect(server)) as client:
        client.settimeout(0.02)
        answer = b""
        for _ in range(int(PATIENCE / 0.02)):  # as long as the client goes on
            try:
                client.sendall(b"G")
                answer = client.recv(2**16)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            break
        assert answer.startswith(b"HTTP/1.1 408 "), "it never ended"


def test_an_answer_may_take_longer_than_the_request_may(server, monkeypatch):
    monkeypatch.setattr(http11, "READ_SECONDS", 0.5)
    server.engine.steps_may_run.clear()
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(server.complete, stream=True)
        assert server.engine.stands.wait(PATIENCE)
        end = time.monotonic() + 1
        until(lambda: time.monotonic() > end)
        server.engine.steps_may_run.set()
        assert answer.result(PATIENCE).text.endswith("data: [DONE]\n\n")


def test_an_upgrade_is_not_taken(server):
    upgrade = {"Upgrade": "websocket", "Connection": "upgrade", "Sec-WebSocket-Version": "13"}
    assert server.http.get("/v1/models", headers=upgrade).status_code == 200
