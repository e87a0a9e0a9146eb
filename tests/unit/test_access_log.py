"""The log: one line per request, with an id that the client gets back, and never a prompt unless asked for."""

import json
import logging

import pytest

from nr_serve.logs import JsonFormatter, TextFormatter
from tests.fakes import serving
from tests.waiting import until


@pytest.fixture
def served():
    with serving() as served:
        yield served


@pytest.fixture
def lines(caplog):
    """The fields of the access log's lines so far."""
    caplog.set_level(logging.DEBUG)
    return lambda: [
        r.fields for r in caplog.records if r.name == "nr_serve.api.middleware.access_log" and r.msg == "request"
    ]


@pytest.mark.parametrize("given", ["a-1", "x" * 128, "ABC.d_e:9"])
def test_a_clean_id_of_the_clients_is_kept(served, given):
    for path in ("/health", "/v1/models", "/no/such"):
        assert served.http.get(path, headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", "ä", "a;b", '"'])
def test_any_other_id_is_replaced(served, given):
    ids = {served.http.get("/health", headers={"X-Request-Id": given.encode()}).headers["x-request-id"]}
    ids.add(served.http.get("/health").headers["x-request-id"])
    assert len(ids) == 2
    assert given not in ids
    assert all(len(each) == 32 for each in ids)


def test_streams_and_refusals_carry_the_id_too():
    with serving(api_key="k") as served:
        assert served.complete().headers["x-request-id"]
        served.http.headers["authorization"] = "Bearer k"
        assert served.complete(stream=True).headers["x-request-id"]
        served.engine.submit = None
        assert (response := served.complete()).status_code == 500
        assert response.headers["x-request-id"]


def test_a_request_is_one_line(lines):
    with serving(api_key="k") as served:
        served.http.headers["authorization"] = "Bearer k"
        served.complete(max_tokens=3)
        served.http.get("/v1/no%0Asuch?key=secret")
    asked, missing = lines()
    assert {name: asked[name] for name in ("method", "path", "status", "key")} == {
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "key": "api-key",
    }
    assert asked["seconds"] > 0
    assert (missing["path"], missing["status"]) == ("/v1/no%0Asuch", 404)


@pytest.mark.parametrize("stream", [False, True])
def test_the_line_of_a_request_to_the_model_has_its_tokens_and_selection(served, lines, stream):
    served.complete(prompt=["hi", "hello"], n=2, max_tokens=3, stream=stream)
    served.complete(model="hu", max_tokens=1)
    until(lambda: len(lines()) == 2)  # a line is written once its answer is out
    first, second = lines()
    numbers = ("prompt_tokens", "completion_tokens", "selection")
    assert [first[name] for name in numbers] == [3 + 6, 12, "base"], "each prompt counts once; BOS is a token"
    assert [second[name] for name in numbers] == [3, 1, "hu"]


def test_prompts_are_logged_if_asked_for(lines):
    with serving(log_prompts=True) as served:
        served.complete(prompt=["hi", "there"], n=2, max_tokens=1)
    assert lines()[0]["prompts"] == ["<s>hi", "<s>there"]


def test_requests_for_health_and_metrics_are_logged_only_if_asked_for(lines):
    paths = ["/health", "/ready", "/metrics"]
    with serving() as served:
        for path in paths:
            served.http.get(path)
    assert lines() == []
    with serving(log_health=True) as served:
        for path in paths:
            served.http.get(path)
    assert {line["path"] for line in lines()} == set(paths)


def test_no_text_of_a_prompt_is_logged_whatever_becomes_of_the_request(served, caplog):
    caplog.set_level(logging.DEBUG)
    wrong = ({"n": 0}, {"max_tokens": 10_000}, {"model": "none"}, {"prompt": ["hush hush", 1]})
    for more in ({}, {"stream": True}, *wrong):
        served.complete(**({"prompt": "hush hush"} | more))
        served.chat(**({"messages": [{"role": "user", "content": "hush hush"}]} | more))
    served.engine.submit = None
    assert served.complete(prompt="hush hush").status_code == 500
    assert len(caplog.records) > 10
    formatted = [form.format(record) for record in caplog.records for form in (JsonFormatter(), TextFormatter())]
    assert not [line for line in formatted if "hush" in line]


def test_a_bug_is_logged_with_its_trace_under_the_requests_id(served, caplog, monkeypatch):
    def bug(submit):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(caplog.handler, "formatter", JsonFormatter())
    served.engine.submit = bug
    response = served.http.post(
        "/v1/completions", json={"model": "base", "prompt": "x"}, headers={"X-Request-Id": "mine"}
    )
    assert (response.status_code, response.json()["error"]["type"]) == (500, "InternalServerError")
    assert "secret" not in response.text
    (entry,) = [each for each in map(json.loads, caplog.text.splitlines()) if "trace" in each]
    assert (entry["logger"], entry["request_id"]) == ("nr_serve.api.middleware.access_log", "mine")
    assert "RuntimeError: secret detail" in entry["trace"]
