"""Large answers: written in parts, and beside the event loop."""

import json
import random
import threading

import pytest

from nr_serve.api import ask, encode, openai
from nr_serve.engine.messages import Sampling, Submit
from tests.fakes import events, serving
from tests.unit.stepped import PROMPT, Server

ASCII = {}
AS_IT_IS = {"ensure_ascii": False, "allow_nan": False}


def body(rng):
    """Of any size, in the form of answers."""
    tokens = [{str(i): {"logprob": -rng.random(), "decoded_token": 'á"\u2028'}} for i in range(rng.randint(0, 200))]
    choice = {
        "index": 0,
        "logprobs": rng.choice([None, {}, {"content": tokens, "refusal": None}]),
        "prompt_logprobs": [None, *tokens],
        "gates": {"tokens": tokens[:3], "token_text": []},
    }
    usage = {"usage": {"details": {"cached": 1}}}
    return {"id": "x", "é": 1.5, "choices": [choice] * rng.randint(0, 3), "list": list(range(130)), **usage}


@pytest.mark.parametrize("options", [ASCII, AS_IT_IS])
def test_in_parts_it_is_what_it_is_at_once(options):
    rng = random.Random(1)
    for _ in range(30):
        answer = body(rng)
        assert encode.in_parts(answer, **options) == json.dumps(answer, separators=(",", ":"), **options).encode()


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


def test_many_token_ids_are_written_beside_the_event_loop(server, monkeypatch):
    threads, plain = [], encode.in_parts
    monkeypatch.setattr(
        encode, "in_parts", lambda *a, **b: threads.append(threading.current_thread().name) or plain(*a, **b)
    )
    monkeypatch.setattr(openai, "MANY_IDS", 150)
    for length in (150, 151):
        body = {"prompt": "x" * length, "add_special_tokens": False}
        assert server.http.post("/tokenize", json=body).json()["tokens"] == [120] * length
    assert [name.startswith("nr-report") for name in threads] == [True]


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_echo_is_written_beside_the_event_loop(server, monkeypatch, stream):
    written: list[tuple[object, str]] = []
    plain = json.JSONEncoder.encode

    def recording(encoder, value):
        written.append((value, threading.current_thread().name))
        return plain(encoder, value)

    monkeypatch.setattr(json.JSONEncoder, "encode", recording)
    monkeypatch.setattr(ask, "LARGE_REPORT", 0)
    response = server.complete(prompt=["x" * 150] * 4, n=128, echo=True, max_tokens=1, stream=stream)
    answers = events(response) if stream else [response.json()]
    texts = [choice["text"] for each in answers for choice in each["choices"]]
    assert [len(text) for text in texts] == [151] * 512
    echoes = [thread for value, thread in written if isinstance(value, str) and len(value) == 151]
    assert len(echoes) == 512
    assert all(thread.startswith("nr-report") for thread in echoes)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_a_large_answer_is_written_a_little_at_a_time_beside_the_event_loop(server, monkeypatch, stream, chat):
    written: list[tuple[int, str]] = []
    plain = json.JSONEncoder.encode

    def recording(encoder, value):
        text = plain(encoder, value)
        written.append((len(text), threading.current_thread().name))
        return text

    monkeypatch.setattr(json.JSONEncoder, "encode", recording)
    text = "x" * 150
    if chat:
        asked = {"messages": [{"role": "user", "content": text}]}
    else:
        asked = {"prompt": [text] * 10, "echo": True, "logprobs": 20}
    more = {"prompt_logprobs": 20, "max_tokens": 2, "stream": stream}
    response = (server.chat if chat else server.complete)(**asked, **more)
    assert response.status_code == 200
    size = len(response.content)
    assert size > 2**17
    large = [(n, thread) for n, thread in written if n > 2**13]
    assert sum(n for n, _ in large) > size / 2
    assert all(thread.startswith("nr-report") for _, thread in large)
    assert max(written)[0] < 2**17
    answers = events(response) if stream else [response.json()]
    holders = answers if chat else [choice for each in answers for choice in each["choices"]]
    reports = [each["prompt_logprobs"] for each in holders if "prompt_logprobs" in each]
    assert len(reports) == (1 if chat else 10)
    assert all(len(report) >= 151 and report[0] is None and len(report[1]) >= 20 for report in reports)


def test_more_than_may_be_held_is_refused_by_what_is_asked(server):
    error = server.complete(n=128, max_tokens=100, logprobs=20).json()["error"]
    assert (error["code"], error["param"]) == (400, "logprobs")
    assert "268,800 entries" in error["message"]


def test_a_step_writes_no_more_tokens_of_a_prompt_than_it_reads(monkeypatch):
    server = Server(budget=8)
    looked = 0
    plain = server.core._tokenizer.token_text

    def counting(token_id):
        nonlocal looked
        looked += 1
        return plain(token_id)

    monkeypatch.setattr(server.core._tokenizer, "token_text", counting)
    asked = Sampling(max_tokens=0, prompt_logprobs=2)
    assert server.core.add(Submit("r", PROMPT, asked, ())) is None
    while "r" not in server.ended:
        before = looked
        server.step()
        assert looked - before <= 8 * (1 + 2)
    assert looked == len(PROMPT) + 2 * (len(PROMPT) - 1)
    assert [token.id for token in server.prompts["r"]] == list(PROMPT)
    assert [token.logprob is None for token in server.prompts["r"]] == [True] + [False] * (len(PROMPT) - 1)
