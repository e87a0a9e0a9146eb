"""The server in this process: its answers are the naive loop's, and a refusal raises this project's errors."""

import asyncio
import gc
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import nr_serve
from nr_serve import Server
from nr_serve.errors import (
    BadAdapterFile,
    BadRequest,
    Conflict,
    NotFound,
    NrError,
    TimedOut,
    Unavailable,
    UnsupportedBase,
)
from nr_serve.neutral.format import write_adapter
from tests import tiny
from tests.waiting import PATIENCE, until

PAGE = (Path(__file__).parents[2] / "docs" / "notebook.md").read_text(encoding="utf-8")
SMALL = {"device": "cpu", "slots": 2, "slot_width": 16, "pages": 256, "threads": 1}
PROMPT = "A fájl mentéséhez"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base `tiny` and an adapter's file."""
    place = tmp_path_factory.mktemp("place")
    tiny.save(tiny.model(), place / "tiny")
    made = tiny.adapter(tiny.model(), 1, carry=0.5)
    write_adapter(place / "hu.safetensors", made.info, made.blocks)
    return place


@pytest.fixture(scope="module")
def server(place):
    with Server([place / "hu.safetensors"], model=str(place / "tiny"), **SMALL) as server:
        yield server


def ids(answer):
    return [choice["token_ids"] for choice in answer.body["choices"]]


def test_adapters_are_given_once(place):
    with pytest.raises(BadRequest, match="the adapters are given already"):
        Server(place / "hu.safetensors", adapter=[str(place / "hu.safetensors")], model=str(place / "tiny"))


def test_completions_are_the_naive_loops(server):
    hu = tiny.adapter(tiny.model(), 1, carry=0.5)
    ask = {"max_tokens": 6, "temperature": 0, "return_token_ids": True}
    assert server.model == "tiny"
    assert ids(server.complete(PROMPT, **ask)) == [tiny.answer(PROMPT, 6, hu)]
    assert ids(server.complete(PROMPT, adapters=[], **ask)) == [tiny.answer(PROMPT, 6)]
    assert ids(server.complete([PROMPT, "x"], model="tiny@none", **ask)) == [
        tiny.answer(PROMPT, 6),
        tiny.answer("x", 6),
    ]


def test_an_answer_is_its_text(server):
    answer = server.complete("x", max_tokens=6, n=2, seed=1)
    assert answer.texts == tuple(choice["text"] for choice in answer.body["choices"])
    assert str(answer) == answer.text == answer.texts[0]
    assert len(answer.texts) == 2


def test_an_answer_that_only_calls_tools_is_printed_as_no_text(tmp_path):
    base = tiny.save(tiny.model(), tmp_path / "calling")
    tokenizer = tiny.tokenizer().hf
    tokenizer.chat_template = '{% if tools %}<tool_call>{"name": {{ tools }}, {% endif %}{{ messages[0].content }}'
    tokenizer.save_pretrained(base)
    tools = [{"type": "function", "function": {"name": "now"}}]
    with Server(model=str(base), **SMALL) as server:
        spaces = {str(i): -100 for i in tokenizer(" \n\t", add_special_tokens=False)["input_ids"]}
        answer = server.chat(
            "hi", tools=tools, tool_choice="required", parallel_tool_calls=False, logit_bias=spaces, max_tokens=200
        )
    message = answer.body["choices"][0]["message"]
    assert [made["function"]["name"] for made in message["tool_calls"]] == ["now"]
    assert message["content"] is None
    assert (answer.texts, f"{answer}") == (("",), "")


def test_a_stream_comes_in_pieces_that_make_the_answer(server):
    ask = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    pieces = list(server.stream("A fájl", **ask))
    assert len(pieces) > 1
    assert "".join(pieces) == server.complete("A fájl", **ask).text
    pieces = list(server.stream_chat("hi", **ask))
    assert "" not in pieces
    assert "".join(pieces) == server.chat("hi", **ask).text
    with pytest.raises(BadRequest, match="`complete` or `chat`"):
        next(server.stream("A fájl", stream=False))


def test_a_stream_is_there_before_its_answer_is_whole_and_ends_where_it_is_left(server):
    before = count(server, "abort")
    stream = server.stream("A fájl", max_tokens=200, temperature=0, ignore_eos=True)
    assert isinstance(next(stream), str)
    stream.close()
    assert count(server, "abort") == before + 1
    assert "\nnr_requests_in_flight 0.0\n" in metrics(server)
    for _ in server.stream("A fájl", max_tokens=200):
        break


def test_an_interrupted_stream_is_interrupted_and_gives_its_request_back(server, monkeypatch):
    before = count(server, "abort")
    stream = server.stream("A fájl", max_tokens=200, temperature=0, ignore_eos=True)
    next(stream)

    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    until(lambda: count(server, "abort") == before + 1)
    assert server.complete("A fájl", max_tokens=2, temperature=0).body["usage"]["completion_tokens"] == 2


def test_a_stream_that_is_refused_raises_when_it_is_read(server):
    for error, fields in [(NotFound, {"model": "nobody"}), (BadRequest, {"top_p": 2})]:
        with pytest.raises(error):
            list(server.stream("x", max_tokens=1, **fields))


@pytest.mark.parametrize(
    ("prompt", "fields", "param"), [("x", {"n": 2}, "n"), (["x", "y"], {}, "prompt"), ([[1, 2], [3]], {}, "prompt")]
)
def test_several_answers_are_no_stream_and_nothing_is_asked_of_the_engine(server, prompt, fields, param):
    asked = re.compile("^nr_requests_total.*", re.M)
    before = asked.findall(metrics(server))
    with pytest.raises(BadRequest, match="one answer can be streamed") as caught:
        next(server.stream(prompt, max_tokens=1, **fields))
    assert caught.value.param == param
    assert asked.findall(metrics(server)) == before
    for one in (["x"], [1, 2]):
        assert len(list(server.stream(one, max_tokens=1, temperature=0, ignore_eos=True))) > 0


def test_an_error_in_mid_stream_keeps_its_kind(server, monkeypatch):
    def late(*_):
        raise TimedOut("too late", param="timeout")

    stream = server.stream("A fájl", max_tokens=200, temperature=0, ignore_eos=True)
    next(stream)
    monkeypatch.setattr("nr_serve.api.openai.Tally.count", late)
    with pytest.raises(TimedOut, match="too late") as caught:
        list(stream)
    assert caught.value.param == "timeout"


def test_a_bug_in_mid_stream_is_logged_once_and_ends_it(server, caplog, monkeypatch):
    def bug(*_):
        raise RuntimeError("secret detail")

    stream = server.stream("A fájl", max_tokens=200, temperature=0, ignore_eos=True)
    next(stream)
    monkeypatch.setattr("nr_serve.api.openai.Tally.count", bug)
    with pytest.raises(NrError, match="broke off"):
        list(stream)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "secret detail" in str(record.exc_info[1])
    assert "\nnr_requests_in_flight 0.0\n" in metrics(server)


def metrics(server) -> str:
    return server._run(server._http.get, "/metrics").text


def count(server, reason: str) -> float:
    """Answers ended for this reason."""
    found = re.findall(rf'nr_requests_total{{finish_reason="{reason}".*}} (.+)', metrics(server))
    return sum(map(float, found))


def test_chat_goes_through_the_template(server):
    hu = tiny.adapter(tiny.model(), 1, carry=0.5)
    ask = {"max_tokens": 6, "temperature": 0, "return_token_ids": True}
    expected = tiny.answer("<user>hi\n<assistant>", 6, hu)
    assert ids(server.chat("hi", **ask)) == [expected]
    assert ids(server.chat([{"role": "user", "content": "hi"}], **ask)) == [expected]


def test_gates_say_what_fired_at_each_token(server):
    tokens = server.gates("A fájl")
    assert "".join(text for text, _ in tokens) == "A fájl"
    shares = [fired["hu"] for _, fired in tokens]
    assert all(0 <= share <= 1 for share in shares)
    assert 0 < sum(shares) < len(shares)
    assert all(fired == {} for _, fired in server.gates("A fájl", adapters=[]))
    assert server.gates("A fájl", adapters="hu") == tokens, "a name stands for a list of it"
    with pytest.raises(BadRequest, match="one text"):
        server.gates(["A fájl", "x"])


def test_adapters_come_and_go(server, place):
    loaded = server.load_adapter(place / "hu.safetensors", "other", pinned=True, threshold=0.5)
    assert (loaded["name"], loaded["pinned"], loaded["threshold"]) == ("other", True, 0.5)
    assert {adapter["name"] for adapter in server.adapters()} == {"hu", "other"}
    with pytest.raises(Conflict):
        server.load_adapter(place / "hu.safetensors", "other")
    replaced = server.load_adapter(place / "hu.safetensors", "other", replace=True, threshold=0, routed=False)
    assert (replaced["threshold"], replaced["routed"]) == (0, False)
    assert server.unload_adapter("other")["name"] == "other"
    assert [adapter["name"] for adapter in server.adapters()] == ["hu"]


def test_a_relative_path_is_one_from_here(server, place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "here.safetensors").write_bytes((place / "hu.safetensors").read_bytes())
    assert server.load_adapter("here.safetensors")["name"] == "here"
    server.unload_adapter("here")


def test_what_is_refused_raises_and_changes_nothing(server, place, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"not an adapter")
    before = server.adapters()
    for error, attempt in [
        (BadRequest, lambda: server.complete("x", colour="blue")),
        (BadRequest, lambda: server.complete("x", stream=True)),
        (BadRequest, lambda: server.complete("x", temperature=float("nan"))),
        (BadRequest, lambda: server.complete("x", stop={"a"})),
        (BadRequest, lambda: server.complete("\ud800")),
        (NotFound, lambda: server.complete("x", model="nobody")),
        (NotFound, lambda: server.unload_adapter("no/body")),
        (NotFound, lambda: server.load_adapter(tmp_path / "none.safetensors")),
        (BadRequest, lambda: server.load_adapter(place / "hu.safetensors", "tiny")),
        (BadRequest, lambda: server.load_adapter(tmp_path / "bad.safetensors")),
    ]:
        with pytest.raises(error):
            attempt()
    assert server.adapters() == before
    assert server.complete("x", max_tokens=1, temperature=0).text


def test_a_bug_is_logged_once(server, caplog, monkeypatch):
    def bug(*_):
        raise RuntimeError("secret detail")

    monkeypatch.setattr("nr_serve.api.openai.completion_ask", bug)
    with pytest.raises(NrError, match="internal error"):
        server.complete("x")
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "secret detail" in str(record.exc_info[1])


def test_it_works_inside_a_running_event_loop(server):
    async def cell():
        return server.complete("x", max_tokens=2, temperature=0).text

    assert asyncio.run(cell()) == server.complete("x", max_tokens=2, temperature=0).text


def test_threads_may_ask_at_once(server):
    prompts = [f"prompt {i}" for i in range(8)]
    ask = {"max_tokens": 6, "temperature": 0}
    alone = [server.complete(prompt, **ask).text for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: server.complete(prompt, **ask).text, prompts)) == alone


def test_two_servers_live_beside_each_other(server, place):
    with Server(model=str(place / "tiny"), served_model_name="second", **SMALL) as second:
        assert (second.model, second.adapters()) == ("second", [])
        assert [adapter["name"] for adapter in server.adapters()] == ["hu"]


def left(before):
    """Threads begun since `before` that do not end."""
    begun = set(threading.enumerate()) - before
    for thread in begun:
        thread.join(PATIENCE)
    return [thread.name for thread in begun if thread.is_alive()]


def test_a_closed_server_says_so_and_leaves_no_thread(place):
    before = set(threading.enumerate())
    with Server(model=str(place / "tiny"), **SMALL) as server:
        server.complete("x", max_tokens=1)
    server.close()
    with pytest.raises(Unavailable, match="closed"):
        server.complete("x")
    assert left(before) == []


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (UnsupportedBase, "/no/such/base", {"model": "/no/such/base"}),
        (NrError, "No such file", {"adapters": ["/no/such/file.safetensors"]}),
        (BadRequest, "adapter: two words=x", {"adapters": ["two words=x.safetensors"]}),
        (BadRequest, "`tiny` is the base's name", {"adapters": ["tiny=hu.safetensors"]}),
        (BadRequest, "slots: ", {"slots": 0}),
        (BadRequest, "port: this setting is for serving over HTTP", {"port": 8000}),
        (BadRequest, "colour: ", {"colour": "blue"}),
    ],
)
def test_a_server_that_cannot_start_says_why_and_leaves_no_thread(place, error, message, wrong, monkeypatch):
    monkeypatch.chdir(place)
    before = set(threading.enumerate())
    with pytest.raises(error, match=message):
        Server(**{"model": str(place / "tiny"), **SMALL, **wrong})
    assert left(before) == []


def test_a_damaged_file_is_named_as_the_server_names_it(server, place, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((place / "hu.safetensors").read_bytes()[:-100])
    with pytest.raises((BadAdapterFile, BadRequest), match="not a whole safetensors file"):
        server.load_adapter(cut)


def test_the_package_is_imported_without_what_only_the_engine_needs():
    program = "import sys, nr_serve; assert not {'torch', 'httpx', 'fastapi', 'pydantic'} & set(sys.modules); "
    program += "from nr_serve import Server; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        nr_serve.nothing  # noqa: B018


def test_a_process_ends_though_its_server_was_not_closed(place):
    program = f"from nr_serve import Server; Server(model={str(place / 'tiny')!r}, pages=64).complete('x')"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    held = f"from nr_serve import Server; s = Server(model={str(place / 'tiny')!r}, pages=64); exit(3)"
    assert subprocess.run([sys.executable, "-c", held], check=False, timeout=300).returncode == 3


def test_a_forked_process_is_told_that_the_server_stayed_behind_and_may_close_it(server):
    stream = server.stream("x", max_tokens=200, ignore_eos=True)
    next(stream)
    child = os.fork()
    if child == 0:
        try:
            server.complete("x", max_tokens=1)
        except Unavailable:
            stream.close()
            server.close()
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert next(stream)
    stream.close()


def test_a_server_is_closed_while_a_stream_stands(place, capfd):
    server = Server(model=str(place / "tiny"), **SMALL)
    stream = server.stream("A fájl", max_tokens=200, ignore_eos=True)
    next(stream)
    server.close()
    with pytest.raises(Unavailable, match="closed"):
        next(stream)
    del stream
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err


def test_the_examples_of_the_page_run(place, tmp_path, monkeypatch, capsys):
    for name in ("hu", "da"):
        named = tmp_path / "adapters" / name / f"{name}.safetensors"
        named.parent.mkdir(parents=True)
        named.write_bytes((place / "hu.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NR_MODEL", str(place / "tiny"))
    monkeypatch.setenv("NR_PAGES", "256")
    names = {}
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(examples[0].splitlines()) <= 4
    for example in examples:
        exec(example, names)
    out = capsys.readouterr().out
    assert "['da', 'hu']" in out
    assert "nobody" in out
    assert "usage" not in out
    assert "completion_tokens" in out
