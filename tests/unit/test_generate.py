"""A file of requests is answered as the naive loop answers, whatever is wrong with some, and goes on later."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nr_serve.api.app import create_app
from nr_serve.api.bridge import AsyncEngine
from nr_serve.cli import parse
from nr_serve.commands.generate import Generate, generate
from nr_serve.errors import BadRequest, NrError, Unavailable
from nr_serve.metrics import Metrics
from nr_serve.neutral.format import write_adapter
from tests import fakes, tiny
from tests.waiting import until

MODEL = "tiny"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base and an adapter `a`."""
    place = tmp_path_factory.mktemp("place")
    tiny.save(tiny.model(), place / MODEL)
    made = tiny.adapter(tiny.model(), 1, carry=0.5)
    write_adapter(place / "a.safetensors", made.info, made.blocks)
    return place


@pytest.fixture
def flags(place):
    return [
        *("--model", str(place / MODEL), "--adapter", str(place / "a.safetensors"), "--device", "cpu"),
        *("--slots", "1", "--slot-width", "16", "--pages", "256", "--threads", "1"),
    ]


def line(custom_id, **body):
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    body = {"model": MODEL, "max_tokens": 4, "temperature": 0, "return_token_ids": True} | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def run(tmp_path, lines, flags, *, out="out.jsonl"):
    """The exit code, and the lines of the file of answers. Lines are bytes, or become JSON."""
    text = b"".join(each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in lines)
    (tmp_path / "in.jsonl").write_bytes(text)
    code = generate(parse(Generate, "generate", [str(tmp_path / "in.jsonl"), str(tmp_path / out), *flags]))
    return code, read(tmp_path / out)


def read(path):
    return [json.loads(each) for each in path.read_bytes().splitlines()]


def by_id(answers):
    found = {answer["custom_id"]: answer for answer in answers}
    assert len(found) == len(answers), "a custom_id was answered twice"
    return found


def test_each_line_is_answered_as_the_naive_loop_does(tmp_path, flags):
    a = tiny.adapter(tiny.model(), 1, carry=0.5)
    prompts = ["hello", "A fájl mentéséhez", "x" * 40]
    lines, expected = [], {}
    for i, prompt in enumerate(prompts):
        for model, attached in ((MODEL, [a]), (f"{MODEL}@none", []), ("a", [a])):
            lines.append(line(f"{model}-{i}", model=model, prompt=prompt))
            expected[f"{model}-{i}"] = tiny.answer(prompt, 4, *attached)
    lines.append(line("chat", messages=[{"role": "user", "content": "hi"}], adapters=[]))
    expected["chat"] = tiny.answer("<user>hi\n<assistant>", 4)
    code, answers = run(tmp_path, lines, flags)
    assert code == 0
    found = by_id(answers)
    assert found.keys() == expected.keys()
    for custom_id, ids in expected.items():
        answer = found[custom_id]
        assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
        assert answer["id"].startswith("batch_req_")
        assert answer["response"]["request_id"]
        body = answer["response"]["body"]
        assert body["choices"][0]["token_ids"] == ids
        assert body["object"] == ("chat.completion" if custom_id == "chat" else "text_completion")


def test_wrong_lines_are_told_and_stop_nothing(tmp_path, flags):
    good = line("good", prompt="x")
    lines = [
        b"{\n",
        b'"text"\n',
        b"\xff\xfe\n",
        json.dumps(line("infinite", prompt="x", temperature=float("nan"))).encode() + b"\n",
        {k: v for k, v in good.items() if k != "custom_id"},
        good | {"custom_id": 7},
        good | {"custom_id": "get", "method": "GET"},
        good | {"custom_id": "route", "url": "/v1/embeddings"},
        good | {"custom_id": "extra", "priority": 1},
        good | {"custom_id": "body", "body": "x"},
        b"\n",
        good,
        good,
    ]
    code, answers = run(tmp_path, lines, flags)
    assert code == 1
    answered = [answer["custom_id"] for answer in answers if answer["error"] is None]
    assert answered == ["good"]
    errors = [answer for answer in answers if answer["error"] is not None]
    assert all(answer["response"] is None for answer in errors)
    told = [(e["error"]["line"], e["custom_id"], e["error"]["code"]) for e in errors]
    assert sorted(told, key=lambda each: each[0]) == [
        (1, None, "invalid_json_line"),
        (2, None, "invalid_request"),
        (3, None, "invalid_json_line"),
        (4, None, "invalid_json_line"),
        (5, None, "invalid_request"),
        (6, None, "invalid_request"),
        (7, "get", "invalid_request"),
        (8, "route", "invalid_request"),
        (9, "extra", "invalid_request"),
        (10, "body", "invalid_request"),
        (13, "good", "duplicate_custom_id"),
    ]
    messages = {e["error"]["line"]: e["error"]["message"] for e in errors}
    assert messages[5].startswith("custom_id: ")
    assert messages[7].startswith("method: ")
    assert messages[9].startswith("priority: ")


def test_what_the_server_refuses_has_the_servers_status_and_body(tmp_path, flags):
    lines = [
        line("field", prompt="x", colour="blue"),
        line("model", prompt="x", model="nobody"),
        line("stream", prompt="x", stream=True),
        line("long", prompt="x", max_tokens=100_000),
        line("good", prompt="x", stream=False),
    ]
    code, answers = run(tmp_path, lines, flags)
    assert code == 1
    found = {name: (a["error"], a["response"]["status_code"]) for name, a in by_id(answers).items()}
    assert found == {
        "field": (None, 400),
        "model": (None, 404),
        "stream": (None, 400),
        "long": (None, 400),
        "good": (None, 200),
    }
    params = {
        name: answer["response"]["body"].get("error", {}).get("param") for name, answer in by_id(answers).items()
    }
    assert params == {"field": "colour", "model": "model", "stream": "stream", "long": "max_tokens", "good": None}


def test_a_second_run_keeps_what_is_answered_and_does_the_rest(tmp_path, flags):
    # At temperature 1 without a seed, an answer given twice would differ.
    asks = [line(f"r{i}", prompt="x", temperature=1, max_tokens=16) for i in range(4)]
    _, first = run(tmp_path, [*asks[:2], line("r2", prompt=""), b"{\n"], flags)
    out = tmp_path / "out.jsonl"
    assert len(first) == 4
    kept = {a["custom_id"]: a for a in first if a["response"] and a["response"]["status_code"] == 200}
    assert kept.keys() == {"r0", "r1"}
    with out.open("ab") as file:
        file.write(b'{"id":"batch_req_123","custom_id":"r3","resp')
    code, second = run(tmp_path, asks, flags)
    assert code == 0
    assert by_id(second).keys() == {"r0", "r1", "r2", "r3"}
    assert all(by_id(second)[name] == answer for name, answer in kept.items())
    before = out.read_bytes()
    assert run(tmp_path, asks, flags)[0] == 0
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_run_with_nothing_left_loads_no_base(tmp_path, flags):
    asks = [line("r0", prompt="x")]
    _, answers = run(tmp_path, asks, flags)
    code, again = run(tmp_path, asks, ["--model", str(tmp_path / "nowhere")])
    assert code == 0
    assert again == answers


def test_a_killed_run_loses_no_answer_that_was_written(tmp_path, flags):
    asks = [line(f"r{i}", prompt="x", temperature=1, max_tokens=8) for i in range(12)]
    out = tmp_path / "out.jsonl"
    program = (
        "import sys; from nr_serve.cli import parse; from nr_serve.commands.generate import Generate, generate; "
    )
    program += "generate(parse(Generate, 'generate', sys.argv[1:]))"
    with subprocess.Popen([sys.executable, "-c", program, "-", out, *flags], stdin=subprocess.PIPE) as process:
        process.stdin.write(b"".join(json.dumps(ask).encode() + b"\n" for ask in asks[:7]))
        process.stdin.flush()  # and left open: the process waits for more when it is killed
        until(lambda: (out.exists() and out.read_bytes().count(b"\n") == 7) or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    written = by_id(read(out))
    code, answers = run(tmp_path, asks, flags)
    assert code == 0
    assert by_id(answers).keys() == {ask["custom_id"] for ask in asks}
    assert {name: by_id(answers)[name] for name in written} == written


def test_standard_input_and_output(flags, monkeypatch, capsys):
    text = json.dumps(line("a", prompt="x")).encode()  # the last line may end without a line end
    given, taken = io.BytesIO(text), io.BytesIO()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=given))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=taken))
    assert generate(parse(Generate, "generate", ["-", "-", *flags])) == 0
    (answer,) = map(json.loads, taken.getvalue().splitlines())
    assert answer["custom_id"] == "a"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"{\n")))
    assert generate(parse(Generate, "generate", ["-", "-", *flags])) == 1
    assert "1 failed (error in their lines of the output)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        b"notes\n",
        b"one line without end",
        b"{}\n",
        b'{"custom_id": "a"}\n',
        b"[1]\n",
        b'{"id":"batch_req_1"}\n',
        b'{"id":"batch_req_1","custom_id":["a"],"response":{"status_code":200}}\n',
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, flags, text):
    out = tmp_path / "out.jsonl"
    out.write_bytes(text)
    with pytest.raises(BadRequest, match=r"out\.jsonl line 1 is no answer"):
        run(tmp_path, [line("a", prompt="x")], flags)
    assert out.read_bytes() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_files_that_cannot_be_used_are_named(tmp_path, flags, monkeypatch):
    def attempt(requests, answers):
        with pytest.raises(BadRequest) as refused:
            generate(parse(Generate, "generate", [str(requests), str(answers), *flags]))
        return refused.value.message

    requests = tmp_path / "in.jsonl"
    requests.write_text("")
    assert str(tmp_path / "none") in attempt(tmp_path / "none", tmp_path / "out")
    assert str(tmp_path / "no" / "out") in attempt(requests, tmp_path / "no" / "out")
    assert "a file of their own" in attempt(requests, requests)
    with requests.open("ab") as same:
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=same))
        assert "a file of their own" in attempt(requests, "-")
    with requests.open("rb") as same:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=same))
        assert "a file of their own" in attempt("-", requests)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--port", "--api-key", "--adapter-dir"])
def test_flags_of_http_are_unknown_here(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Generate, "generate", ["in", "out", flag, "1"])
    assert ended.value.code == 2
    assert flag in capsys.readouterr().err


def test_what_only_concerns_http_in_the_environment_is_not_read(tmp_path, flags, monkeypatch):
    for name, value in {"NR_API_KEY": "k", "NR_PORT": "none", "NR_ADAPTER_DIR": "/x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NR_MAX_MODEL_LEN", "20")
    code, answers = run(tmp_path, [line("a", prompt="x"), line("b", prompt="x" * 30)], flags)
    assert code == 1
    assert {name: a["response"]["status_code"] for name, a in by_id(answers).items()} == {"a": 200, "b": 400}


def test_a_full_queue_is_waited_for(tmp_path, flags):
    lines = [line(f"r{i}", prompt=["x", "y"], max_tokens=2) for i in range(6)]
    code, answers = run(tmp_path, lines, [*flags, "--max-running", "2", "--max-waiting", "2"])
    assert code == 0
    assert len(by_id(answers)) == 6


class Fakes(list):
    """The fake engines given to runs in place of the real one, each changed by `prepare` before it starts."""

    prepare = staticmethod(lambda engine: None)


@pytest.fixture
def engines(monkeypatch):
    made = Fakes()

    def build(deliver):
        made.append(fakes.FakeEngine(deliver))
        made.prepare(made[-1])
        return made[-1]

    def assemble(config):
        engine = AsyncEngine(build, Metrics())
        return engine, create_app(engine, fakes.tokenizer(), config)

    monkeypatch.setattr("nr_serve.assemble.assemble", assemble)
    return made


def test_many_are_in_flight_but_no_more_than_the_engine_can_use(tmp_path, engines):
    beside = []

    def counting(engine):
        step = engine._step

        def counted():
            beside.append(len(engine._running))
            return step()

        engine._step = counted

    engines.prepare = counting
    lines = [line(f"r{i}", prompt="x", model="base", max_tokens=20) for i in range(20)]
    _, answers = run(tmp_path, lines, ["--max-running", "3"])
    assert len(by_id(answers)) == 20
    assert max(beside) == 6


def test_an_engine_that_fails_ends_the_run_and_leaves_the_rest_for_the_next(tmp_path, engines):
    def failing(engine):
        def answer(submit):
            if len(engine.submits) > 3:
                engine.fail("out of memory")
            return fakes.letters(submit)

        engine.answer = answer

    engines.prepare = failing
    lines = [line(f"r{i}", prompt="x", model="base") for i in range(30)]
    with pytest.raises(Unavailable, match="engine failed"):
        run(tmp_path, lines, ["--max-running", "1"])
    answers = read(tmp_path / "out.jsonl")
    assert 0 < len(answers) < 30
    statuses = {answer["response"]["status_code"] for answer in answers}
    assert {200} <= statuses <= {200, 500}, "what was under way when the engine failed may say so"
    engines.prepare = Fakes.prepare
    assert run(tmp_path, lines, ["--max-running", "1"])[0] == 0
    assert len(by_id(read(tmp_path / "out.jsonl"))) == 30


def test_a_fault_of_the_server_is_logged_and_stops_nothing(tmp_path, engines, monkeypatch, caplog):
    def choice(writer, output):
        raise RuntimeError("a bug")

    monkeypatch.setattr("nr_serve.api.completions.CompletionWriter.choice", choice)
    chat = line("chat", messages=[{"role": "user", "content": "hi"}], model="base")
    code, answers = run(tmp_path, [line("text", prompt="x", model="base"), chat], [])
    assert code == 1
    assert {name: a["response"]["status_code"] for name, a in by_id(answers).items()} == {"text": 500, "chat": 200}
    assert "a bug" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_is_full_ends_the_run(tmp_path, engines):
    lines = [line(f"r{i}", prompt="x", model="base") for i in range(30)]
    (tmp_path / "in.jsonl").write_bytes(b"".join(json.dumps(each).encode() + b"\n" for each in lines))
    with pytest.raises(NrError, match="No space left"):
        generate(parse(Generate, "generate", [str(tmp_path / "in.jsonl"), "/dev/full"]))


def test_an_adapter_that_cannot_be_attached_ends_it_before_it_begins(tmp_path, flags):
    torch.save({}, tmp_path / "bad.safetensors")
    with pytest.raises(NrError, match="safetensors"):
        run(tmp_path, [line("a", prompt="x")], [*flags, "--adapter", str(tmp_path / "bad.safetensors")])
