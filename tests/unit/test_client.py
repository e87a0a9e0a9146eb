import os
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from nr_serve import errors
from nr_serve.client import Client
from nr_serve.serve import bind
from nr_serve.server_process import local_server
from tests.fakes import serving

ASKED = httpx.Request("GET", "http://localhost/v1/models")


@pytest.fixture(scope="module")
def server():
    with serving(admin_key="k") as served:
        yield served


@pytest.fixture
def client(server):
    with Client(server.url, "k") as client:
        yield client


def test_an_adapter_is_loaded_under_its_files_name_listed_and_unloaded(client, tmp_path):
    path = tmp_path / "da.safetensors"
    path.write_bytes(b"good")
    assert client.load(path, pinned=True, threshold=0.5)["threshold"] == 0.5
    assert [adapter["name"] for adapter in client.adapters()] == ["hu", "da"]
    with pytest.raises(errors.Conflict):
        client.load(path)
    assert client.load(path, replace=True)["pinned"] is True
    assert client.load(path, replace=True, pinned=False)["pinned"] is False
    assert client.load(path, "en.x")["name"] == "en.x"
    assert client.unload("da")["deleted"] is True
    with pytest.raises(errors.NotFound, match="`da` does not exist"):
        client.unload("da")


def test_what_the_server_refuses_is_raised_with_its_message_and_field(client, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"bad")
    with pytest.raises(errors.BadRequest, match=r"bad\.safetensors: not a whole safetensors file"):
        client.load(path)
    with pytest.raises(errors.BadRequest) as caught:
        client.complete(model="base", prompt="x", n=0)
    assert caught.value.param == "n"
    with pytest.raises(errors.BadRequest, match="cannot be read"):
        client.load(tmp_path / "none.safetensors")


def test_a_url_may_lack_its_scheme(server):
    with Client(server.url.removeprefix("http://")) as client:
        assert client.url == server.url
        assert client.models()[0]["id"] == "base"


def test_a_missing_key_is_said(server, tmp_path):
    with Client(server.url) as client, pytest.raises(errors.Unauthorized):
        client.unload("hu")


def test_completions_and_models(client):
    assert client.complete(model="base", prompt="x", max_tokens=2)["choices"][0]["text"] == "ab"
    assert client.models()[0]["id"] == "base"


def test_a_url_may_end_as_openais_clients_have_it(server):
    with Client(f"{server.url}/v1/") as client:
        assert client.models()[0]["id"] == "base"


def test_a_name_that_no_adapter_may_have_is_refused_before_anything_is_sent(client, tmp_path):
    with pytest.raises(errors.BadRequest, match="1 to 64 letters"):
        client.load(tmp_path / "none.safetensors", "a/b")


def test_waiting_ends_when_the_server_is_ready():
    with serving(loading=True) as served, Client(served.url) as client:
        with pytest.raises(errors.Unavailable, match="not ready after"):
            client.wait_ready(0.05, poll_s=0.01)
        threading.Timer(0.1, served.engine.may_load.set).start()
        client.wait_ready(10, poll_s=0.01)


def test_waiting_for_a_server_that_takes_connections_but_does_not_answer_ends():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://{}:{}".format(*silent.getsockname())
        with Client(url) as client, pytest.raises(errors.Unavailable, match="not ready after"):
            client.wait_ready(0.3, poll_s=0.1)


def test_waiting_for_a_server_that_ended_ends():
    with Client("http://127.0.0.1:9") as client, pytest.raises(errors.Unavailable, match="ended before"):
        client.wait_ready(60, alive=lambda: False)


def test_a_local_server_that_cannot_start_is_not_waited_for():
    with pytest.raises(errors.Unavailable, match="ended before"), local_server("--model", "/no/such"):
        pytest.fail("it cannot be ready")


def test_no_server_is_said_with_what_to_do():
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    with Client(f"http://127.0.0.1:{port}") as client, pytest.raises(errors.Unavailable, match="nr-serve serve"):
        client.adapters()


def test_a_proxy_in_the_environment_is_not_asked_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://192.0.2.1:9")
    with Client(server.url) as client:
        assert client.models()


@contextmanager
def another(status: int, body: bytes = b""):
    """A client of a server that answers everything so."""

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{other.server_port}") as client:
            yield client
        other.shutdown()


def test_another_kind_of_server_is_not_taken_for_ours():
    with another(502) as client, pytest.raises(errors.NrError, match="502"):
        client.adapters()


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"data": 5}', b'{"data": [{}]}', b"\xff"])
def test_an_answer_of_another_form_is_not_taken_for_ours(body):
    with another(200, body) as client:
        for ask in (client.adapters, client.models):
            with pytest.raises(errors.NrError, match="answers as no nr-serve does"):
                ask()


def test_a_newer_server_may_say_more(server, monkeypatch):
    more = {"object": "list", "data": [], "more": 1}
    monkeypatch.setattr(httpx.Client, "request", lambda *_, **__: httpx.Response(200, json=more, request=ASKED))
    with Client(server.url) as client:
        assert client.models() == []


@pytest.mark.parametrize("url", ["nonsense", "http://[", "ftp://x"])
def test_a_wrong_url_is_said(url):
    with pytest.raises(errors.NrError), Client(url) as client:
        client.adapters()


def test_what_can_be_no_upload_is_refused_before_a_server_is_asked(tmp_path):
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    with Client("http://127.0.0.1:1") as nowhere:
        with pytest.raises(errors.BadRequest, match="it is a device or a pipe"):
            nowhere.load(pipe)
        with pytest.raises(errors.BadRequest, match="an adapter's name is 1 to 64 letters"):
            nowhere.load(tmp_path / "\udcff.safetensors")
        with pytest.raises(errors.BadRequest, match="cannot be an adapter's name"):
            nowhere.unload("\udcff")
