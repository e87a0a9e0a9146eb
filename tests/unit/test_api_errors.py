import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from nr_serve.api import body_route
from nr_serve.api.body_route import LARGE_BYTES, MANY_BRACKETS
from nr_serve.errors import BadRequest, QueueFull
from tests.fakes import serving
from tests.waiting import PATIENCE, until

ROUTES = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/x"),
    ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/v1/adapters"), ("GET", "/v1/adapters/x"),
]  # fmt: skip
CHANGES = [
    ("PUT", "/v1/adapters/x"), ("POST", "/v1/adapters"), ("PATCH", "/v1/adapters/x"), ("DELETE", "/v1/adapters/x"),
    ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
]  # fmt: skip
OPEN = [("GET", path) for path in ("/", "/health", "/ready", "/metrics", "/version", "/openapi.json")]


@pytest.fixture
def server():
    with serving() as served:
        yield served


def status(served, method, path, key=None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    response = served.http.request(method, path, headers=headers)
    if response.is_error:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.status_code


def test_every_route_is_listed_here_as_open_guarded_or_a_change(server):
    paths = server.http.get("/openapi.json").json()["paths"]
    served = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    known = {(m, p.replace("/models/x", "/models/{model}").replace("/x", "/{name}")) for m, p in ROUTES + CHANGES}
    assert served == known | set(OPEN) - {("GET", "/openapi.json")}


def test_with_both_keys_each_opens_its_own():
    with serving(api_key="user", admin_key="admin") as served:
        for method, path in ROUTES:
            assert status(served, method, path) == status(served, method, path, "wrong") == 401
            assert status(served, method, path, "user") not in (401, 403)
            assert status(served, method, path, "admin") not in (401, 403)
        for method, path in CHANGES:
            assert status(served, method, path) == status(served, method, path, "wrong") == 401
            assert status(served, method, path, "user") == 403
            assert status(served, method, path, "admin") not in (401, 403)
        for method, path in OPEN:
            assert status(served, method, path) == 200


@pytest.mark.parametrize(("keys", "inference"), [({"api_key": "k"}, 401), ({"admin_key": "k"}, 200)])
def test_one_key_alone_guards_changes(keys, inference):
    with serving(**keys) as served:
        assert status(served, "GET", "/v1/models") == inference
        assert status(served, "DELETE", "/v1/adapters/x") == 401
        assert status(served, "DELETE", "/v1/adapters/x", "k") == 404


def test_a_missing_key_is_asked_for_before_the_body_is_read():
    with serving(api_key="k") as served:
        response = served.http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "AuthenticationError"


def test_routes_and_methods_that_do_not_exist(server):
    error = server.http.get("/v2/x").json()["error"]
    assert (error["code"], error["message"]) == (404, "Invalid URL (GET /v2/x)")
    response = server.http.delete("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == 405


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff\xfe", b'"x"', b"null", b"{" * 100_000])
def test_a_body_that_is_no_object_is_refused(server, content):
    response = server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, 400)


def test_a_body_over_4_mib_is_refused_whether_its_length_is_said_or_not(server):
    content = b" " * (2**22 + 1)
    for body in (content, iter([content])):
        response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["type"]) == (413, "RequestTooLargeError")


def test_a_full_queue_says_when_to_come_back(server):
    for stream in (False, True):
        server.engine.error[0] = QueueFull("1024 requests wait already")
        response = server.complete(stream=stream)
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["type"] == "RateLimitError"


def test_a_refusal_by_the_engine_before_the_first_token_is_a_status(server):
    for ask in (server.complete, server.chat):
        server.engine.error[0] = BadRequest("no page is free for this", param="prompt")
        answer = ask(n=3, stream=True)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt"


def test_an_error_in_mid_stream_is_the_streams_last_event(server):
    server.engine.error[2] = BadRequest("out of pages")
    lines = [line for line in server.complete(stream=True).text.split("\n\n") if line]
    assert len(lines) == 3
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"] == "out of pages"


def test_one_failing_answer_aborts_its_siblings(server):
    server.engine.error[3] = BadRequest("no")
    assert server.complete(n=3).status_code == 400
    until(lambda: len(server.engine.aborted) == 2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_a_client_that_goes_away_has_its_requests_aborted(server, stream, started):
    engine = server.engine

    def one_step(submit):
        engine.steps_may_run.clear()
        return [97] * 10

    engine.answer = one_step
    if not started:
        engine.steps_may_run.clear()
    body = json.dumps({"model": "base", "prompt": "x", "max_tokens": 190, "n": 2, "stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: len(engine.submits) == 2 and not engine.steps_may_run.is_set())
        if started and stream:
            client.recv(100)
    until(lambda: len(engine.aborted) == 2)
    engine.steps_may_run.set()
    assert "nr_requests_in_flight 0.0" in server.http.get("/metrics").text


def test_until_the_engine_is_ready_the_server_lives_but_refuses():
    with serving(loading=True) as served:
        assert served.http.get("/health").json() == {"status": "loading"}
        assert [served.http.head(path).status_code for path in ("/health", "/ready")] == [200, 503]
        for answer in (served.http.get("/ready"), served.complete(), served.http.get("/v1/adapters")):
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "ServiceUnavailableError")
        assert served.http.get("/metrics").status_code == 200
        served.engine.may_load.set()
        served.until("/ready", 200)
        assert served.complete(model="hu").status_code == 200


def test_an_engine_that_cannot_start_is_unhealthy():
    with serving(failure="/srv/base is not supported") as served:
        for path in ("/health", "/ready", "/v1/models"):
            assert served.http.get(path).status_code == 503
        assert "/srv" not in served.http.get("/health").text, "the reason is the operator's"
        assert served.complete().status_code == 503
        assert served.http.get("/metrics").status_code == 200


def test_an_engine_that_dies_answers_whoever_waits(server):
    server.engine.steps_may_run.clear()
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(server.complete)
        until(lambda: bool(server.engine.submits))
        server.engine.fail("the GPU is gone")
        answer = waiting.result(PATIENCE)
    assert (answer.status_code, server.http.get("/health").status_code) == (500, 503)
    assert server.complete().status_code == 503
    for each in (answer, server.http.get("/health"), server.complete()):
        assert "the GPU is gone" not in each.text, "the reason is the operator's"


def test_the_document_promises_no_422(server):
    document = server.http.get("/openapi.json").text
    assert '"422"' not in document
    assert "ValidationError" not in document


def test_the_playground_loads_nothing_from_elsewhere(server):
    response = server.http.get("/")
    assert "http://" not in response.text
    assert "https://" not in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_pages_of_other_origins_may_not_call_the_server_unless_named(server):
    def answers(served) -> list[str | None]:
        headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        plain = served.http.post("/v1/completions", json={}, headers={"Origin": "https://page.example"})
        # As OpenAI's client in a page asks, among others.
        headers["Access-Control-Request-Headers"] = "authorization, content-type, x-stainless-lang, traceparent"
        asked = served.http.options("/v1/completions", headers=headers)
        if asked.is_success:
            assert "retry-after" in plain.headers["access-control-expose-headers"].lower()
        return [each.headers.get("access-control-allow-origin") for each in (plain, asked)]

    assert answers(server) == [None, None]
    with serving(cors_origin=["https://page.example"], api_key="k") as served:
        assert answers(served) == ["https://page.example"] * 2
    with serving(cors_origin=["https://other.example"]) as served:
        assert answers(served) == [None, None]


RAW = [
    b"\0" * 1000, b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\nX-Request-Id: \xff\r\n\r\n",
    b"GET /%ff%0a%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", b"BREW /v1/adapters/%2e%2e%2fx HTTP/1.1\r\nHost: x\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("raw", RAW)
def test_no_bytes_stop_the_server_or_show_its_inside(server, raw, caplog):
    host, port = server.url.removeprefix("http://").split(":")
    got = []
    with socket.create_connection((host, int(port))) as client, suppress(OSError):  # it may hang up first
        client.sendall(raw)
        client.shutdown(socket.SHUT_WR)
        got.extend(iter(lambda: client.recv(65536), b""))
    assert b"Traceback" not in b"".join(got)
    assert b" 500 " not in b"".join(got)
    assert server.complete().status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{}] * 50_000}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 5_000}, "messages"),
        ("/v1/completions", {"prompt": "a", "stop": "x" * 2_000}, "stop"),
        ("/v1/completions", {"prompt": "a", **{f"f{i}": 1 for i in range(5_000)}}, None),
        (
            "/v1/completions",
            {"prompt": [[1] * 100] * 8, "n": 128, "prompt_logprobs": 20, "max_tokens": 0},
            "prompt_logprobs",
        ),
        # Each token has its own log probability beside the likeliest ones, and its gates.
        (
            "/v1/completions",
            {"prompt": [[1] * 100] * 8, "n": 128, "prompt_logprobs": 10, "max_tokens": 0},
            "prompt_logprobs",
        ),
        (
            "/v1/completions",
            {"prompt": [[1] * 100] * 8, "n": 128, "prompt_logprobs": 9, "gates": True, "max_tokens": 0},
            "prompt_logprobs",
        ),
        ("/v1/completions", {"prompt": ["a"] * 4, "n": 128, "logprobs": 20, "max_tokens": 190}, "logprobs"),
        ("/v1/completions", {"prompt": "a", "repetition_penalty": 1e-300}, "repetition_penalty"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {f"x{i}": "y" for i in range(1_025)}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "metadata": {f"x{i}": "y" for i in range(17)}}, "metadata"),
        ("/v1/completions", {"prompt": "a", "metadata": {"x": "y" * 513}}, "metadata.x"),
        ("/v1/completions", {"prompt": "a", "cache_salt": "x" * 257}, "cache_salt"),  # kept with its page
    ],
)
def test_what_would_cost_more_than_a_request_may_is_refused_by_name(server, path, body, param):
    response = server.http.post(path, json={"model": "base", **body})
    assert response.status_code == 400
    assert (response.json()["error"]["param"] or "").split("[")[0] == (param or "")


def test_a_large_body_is_read_beside_the_event_loop_and_refused_as_a_small_one_is(server):
    space = " " * LARGE_BYTES
    for body in ({"n": 0}, {"colour": 1}, {"stop": [1]}, {"prompt": [[None]]}, {"stream_options": {}}, {"n": 2}):
        text = json.dumps({"model": "base", "prompt": "hi", "seed": 1, "max_tokens": 2} | body)
        both = [
            server.http.post("/v1/completions", content=each, headers={"content-type": "application/json"})
            for each in (text, text + space)
        ]
        assert both[0].status_code == both[1].status_code
        small, large = (each.json() for each in both)
        assert small.get("error") == large.get("error")
        texts = [[choice["text"] for choice in each.get("choices", ())] for each in (small, large)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("more", ["", " " * LARGE_BYTES, "[" * MANY_BRACKETS], ids=["small", "large", "brackets"])
def test_a_body_that_takes_long_to_read_is_read_on_the_thread_of_texts(server, more, monkeypatch):
    threads, parse = [], body_route.parse_json
    monkeypatch.setattr(
        body_route, "parse_json", lambda data: threads.append(threading.current_thread().name) or parse(data)
    )
    content = json.dumps({"prompt": "hi", "metadata": {"a": more}})
    server.http.post("/tokenize", content=content, headers={"content-type": "application/json"})
    assert [name.startswith("nr-text") for name in threads] == [bool(more)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b'{"model": ' * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b'{"model": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"[1]", "a JSON object is required"),
        (b'{"model": "base", "prompt": "x", "metadata": {"a": [' + b"[]," * 200_000 + b"[]]}}", "opening brackets"),
        (b'{"model": "base", "prompt": "' + b"[" * 200_000 + b'"}', "opening brackets"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_with_the_reason(server, body, message):
    for path in ("/v1/completions", "/tokenize", "/v1/adapters"):
        for content in (body, body + b" " * LARGE_BYTES):
            answer = server.http.post(path, content=content, headers={"content-type": "application/json"})
            assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True)


def test_a_body_of_another_type_is_refused_with_the_type_it_needs(server):
    answer = server.http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert (answer.status_code, "application/json" in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/unload_lora_adapter"])
def test_json_without_its_type_is_refused_for_a_page_of_any_site_may_send_that(server, path):
    content = json.dumps({"model": "base", "prompt": "x", "lora_name": "hu"}).encode()
    request = server.http.build_request("POST", path, content=content, headers={"Origin": "https://evil.example"})
    assert "content-type" not in request.headers
    answer = server.http.send(request)
    assert (answer.status_code, "application/json" in answer.json()["error"]["message"]) == (400, True)


def test_an_unknown_field_of_a_part_of_a_message_is_named(server):
    part = {"type": "text", "text": "x", "colour": {}}
    error = server.chat(messages=[{"role": "user", "content": [part]}]).json()["error"]
    assert (error["code"], "colour" in error["message"]) == (400, True)


@pytest.mark.parametrize("name", ["colour", "col-our", "a[0]"])
def test_a_field_that_nobody_knows_is_refused_by_its_name_whatever_that_is(server, name):
    error = server.complete(**{name: 1}).json()["error"]
    assert (error["code"], error["param"], name in error["message"]) == (400, name, True)


def test_an_error_repeats_only_so_much_of_what_was_sent(server):
    for answer in (
        server.http.get("/" + "a" * 50_000),
        server.complete(**{"x" * 50_000: 1}),
        server.complete(model="m" * 50_000),
    ):
        assert answer.status_code in (400, 404)
        assert len(answer.content) < 3000


@pytest.mark.parametrize("field", ["content", "tool_calls"])
def test_the_parts_of_a_message_are_counted_before_they_are_looked_at(server, field):
    message = {"role": "assistant", field: [{}] * 100_000}
    error = server.chat(messages=[message]).json()["error"]
    assert (error["code"], error["param"].startswith(f"messages[0].{field}")) == (400, True)
    assert len(error["message"]) < 500


def test_a_trailing_slash_is_not_found_rather_than_sent_elsewhere(server):
    assert server.http.post("/v1/completions/", json={}).status_code == 404
