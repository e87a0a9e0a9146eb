"""A tokenizer without a model and an engine without tensors, and a server over them in a thread."""

import json
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from nr_serve.api.app import create_app
from nr_serve.api.bridge import AsyncEngine
from nr_serve.api.http11 import Http11Protocol
from nr_serve.config import ServeConfig
from nr_serve.engine.messages import (
    AdapterGates,
    AdapterView,
    EngineInfo,
    EngineStatistics,
    Leak,
    LoadAdapter,
    Output,
    PatchAdapter,
    ReadStatistics,
    StepEvents,
    StepReport,
    Submit,
    Token,
    UnloadAdapter,
)
from nr_serve.errors import BadAdapterFile, Conflict, NotFound, NrError, Unavailable
from nr_serve.metrics import Metrics
from nr_serve.serve import bind
from nr_serve.tokenizer import Detokenizer, Tokenizer
from tests.waiting import PATIENCE, until

BOS, EOS, VOCAB = 256, 257, 258
MAX_MODEL_LEN = 200


class ByteTokenizer:
    """A byte is a token, and so is </s>; BOS comes first."""

    chat_template = "yes"
    all_special_ids = (BOS, BOS + 1)

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(BOS)} | {"": BOS}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        first, *rest = (list(part.encode()) for part in text.split("</s>"))
        return [BOS] * add_special_tokens + first + [i for part in rest for i in (BOS + 1, *part)]

    def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        text, held = "", bytearray()
        for i in [*ids, None]:
            if i is not None and i < BOS:
                held.append(i)
                continue
            text, held = text + held.decode(errors="replace"), bytearray()
            if i is not None and not skip_special_tokens:
                text += "<s>" if i == BOS else "</s>"
        return text

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return f"<0x{token_id:02X}>"

    def apply_chat_template(
        self, messages: list[dict], tokenize: bool, add_generation_prompt: bool, **more: Any
    ) -> str:
        if messages[0]["role"] == "assistant":
            raise ValueError("the user speaks first")
        text = "".join(f"[{m['role']}]{m['content']}" for m in messages)
        return text + "[assistant]" * add_generation_prompt


def tokenizer() -> Tokenizer:
    return Tokenizer(ByteTokenizer())


def view(name: str, version: str = "v1", **more: Any) -> AdapterView:
    values: dict[str, Any] = {"domain": "hu", "state": "attached", "slot": 0, "nbytes": 1000, "h": 16, "carry": 0.5}
    values |= {
        "threshold": 0.0,
        "pinned": False,
        "routed": True,
        "requests": 0,
        "loaded_at": 1e9,
        "load_seconds": 0.25,
    }
    values |= {"gates": AdapterGates(("0-1", "2-3"), (3, 1), (10, 10), 2.5, {"base": 4})}
    values |= {"neutrality": {"prose": Leak(1, 400, 100), "code": Leak(3, 400, 100)}}
    return AdapterView(name=name, version=version, **(values | more))


class FakeEngine:
    """Writes a, b, c, ... from the letter that the seed says, a token a step, until max_tokens or a stop."""

    def __init__(self, deliver: Callable[[StepEvents], None]) -> None:
        self.status, self.failure, self.info = "loading", None, None
        self.deliver = deliver
        self.submits: list[Submit] = []
        self.commands: list[Any] = []
        self.aborted: list[str] = []
        self.adapters: dict[str, AdapterView] = {"hu": view("hu")}
        self.answer: Callable[[Submit], list[int]] = letters
        self.load = (0, 0, 0, 100)
        """Requests running and waiting, pages used and there, as ReadStatistics answers."""
        self.cached_tokens: Callable[[Submit], int] = lambda submit: 0
        """Tokens of a request's prompt that the prefix cache had."""
        self.logprob: Callable[[int], float] = lambda token_id: -1.5
        """Of an answer's token, if log probabilities are asked for."""
        self.error: dict[int, Exception] = {}
        """Error to end one request with, by how many tokens it has by then."""
        self.may_load, self.steps_may_run, self.stands = threading.Event(), threading.Event(), threading.Event()
        """`stands`: a step waits until steps may run."""
        self.may_load.set()
        self.steps_may_run.set()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._running: dict[str, tuple[Submit, list[int], Detokenizer]] = {}
        self._thread = threading.Thread(target=self._main, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.may_load.set()
        self.steps_may_run.set()
        self._inbox.put(None)
        self._thread.join()

    def submit(self, request: Submit) -> None:
        self._check()
        self.submits.append(request)
        self._inbox.put(request)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._inbox.put(request_id)

    def call(self, command: Any) -> Future:
        self._check()
        future: Future = Future()
        future.set_running_or_notify_cancel()
        self.commands.append(command)
        self._inbox.put((command, future))
        return future

    def last_load(self) -> LoadAdapter:
        return [each for each in self.commands if isinstance(each, LoadAdapter)][-1]

    def fail(self, reason: str) -> None:
        self.failure, self.status = reason, "failed"

    def _check(self) -> None:
        if self.status != "ready":
            raise Unavailable(f"engine {self.status}")

    def _main(self) -> None:
        self.may_load.wait()
        if self.failure is not None:
            self.status = "failed"
            return
        self.info = EngineInfo("base", "f00d", 4, 8, VOCAB, MAX_MODEL_LEN, "cpu", "float32")
        self.status = "ready"
        while self._take():
            if self._running:
                if not self.steps_may_run.is_set():
                    self.stands.set()
                self.steps_may_run.wait()
                self.deliver(self._step())

    def _take(self) -> bool:
        while not (self._running and self._inbox.empty()):
            message = self._inbox.get()
            if message is None:
                return False
            if isinstance(message, Submit):
                self._running[message.request_id] = (message, [], Detokenizer(tokenizer(), message.prompt_ids))
            elif isinstance(message, str):
                self._running.pop(message, None)
            else:
                _carry_out(self, *message)
        return True

    def _step(self) -> StepEvents:
        outputs = [self._advance(*running) for running in list(self._running.values())]
        for output in outputs:
            if output.finish_reason is not None:
                del self._running[output.request_id]
        time.sleep(0.001)
        report = StepReport(0.001, 0, len(outputs), len(outputs), 0)
        return StepEvents(tuple(outputs), report)

    def _advance(self, submit: Submit, written: list[int], text: Detokenizer) -> Output:
        name, asked, cached = submit.request_id, submit.sampling, self.cached_tokens(submit)
        if len(written) in self.error:
            return Output(name, finish_reason="error", error=self.error.pop(len(written)))
        prompt = None
        if not written and (asked.prompt_logprobs is not None or submit.gates):
            prompt = tuple(_token(i, submit, first=at == 0, prompt=True) for at, i in enumerate(submit.prompt_ids))
        if asked.max_tokens == 0:
            return Output(name, prompt=prompt, finish_reason="length", cached_tokens=cached)
        token_id = self.answer(submit)[len(written)]
        written.append(token_id)
        shown = text.push(token_id)
        reason, stop = None, None
        if token_id in asked.stop_token_ids or any(s.endswith(shown) for s in asked.stop if shown):
            reason, stop, shown = "stop", token_id if token_id in asked.stop_token_ids else shown, ""
        elif len(written) == asked.max_tokens:
            reason = "length"
        tokens = (_token(token_id, submit, self.logprob(token_id)),)
        return Output(name, tokens, shown, prompt, reason, stop, cached_tokens=cached)


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def letters(submit: Submit) -> list[int]:
    start = submit.sampling.seed or 0
    return [97 + (start + i) % 26 for i in range(MAX_MODEL_LEN)]


def _token(
    token_id: int, submit: Submit, logprob: float = -1.5, *, first: bool = False, prompt: bool = False
) -> Token:
    k = submit.sampling.prompt_logprobs if prompt else submit.sampling.logprobs
    gates = {"hu": 0.5} if submit.gates else None
    text = tokenizer().token_text(token_id)
    if k is None or first:
        return Token(token_id, text, gates=gates)
    top = tuple((j, tokenizer().token_text(j), -0.25 * (j - 96)) for j in range(97, 97 + k))
    return Token(token_id, text, logprob, top, gates)


def _carry_out(engine: FakeEngine, command: Any, future: Future) -> None:
    adapters = engine.adapters
    try:
        match command:
            case ReadStatistics():
                future.set_result(EngineStatistics(dict(adapters), len(adapters), 8, *engine.load))
            case LoadAdapter(name, path, replaces):
                if not path.read_bytes().startswith(b"good"):
                    raise BadAdapterFile("not a whole safetensors file")
                if name in adapters and not replaces:
                    raise Conflict("taken", param="name")
                pinned = adapters[name].pinned if name in adapters else False
                more = {"pinned": pinned if command.pinned is None else command.pinned}
                more["routed"] = command.routed is not False
                more["threshold"] = command.threshold or 0.0
                adapters[name] = view(name, path.read_bytes().hex()[:12], slot=len(adapters), **more)
                future.set_result(adapters[name])
            case _ if command.name not in adapters:
                raise NotFound(f"no adapter is called {command.name!r}")
            case UnloadAdapter(name):
                future.set_result(adapters.pop(name))
            case PatchAdapter(name, pinned, threshold, routed):
                change = {"pinned": pinned, "threshold": threshold, "routed": routed}
                adapters[name] = replace(adapters[name], **{k: v for k, v in change.items() if v is not None})
                future.set_result(adapters[name])
    except NrError as error:
        future.set_exception(error)


class Served:
    """A running server: its engine, and a client of it."""

    def __init__(self, engine: FakeEngine, url: str) -> None:
        self.engine, self.url = engine, url
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE)

    def complete(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": "base", "prompt": "hi"} | body)

    def chat(self, **body: Any) -> httpx.Response:
        asked = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
        return self.http.post("/v1/chat/completions", json=asked | body)

    def asked(self) -> Submit:
        """The last request the engine got."""
        return self.engine.submits[-1]

    def until(self, path: str, status: int) -> httpx.Response:
        """Ask until the answer has this status."""
        until(lambda: self.http.get(path).status_code == status)
        return self.http.get(path)


def listening(app: FastAPI):
    """Serve the app in a thread until the block ends; its address."""
    config = uvicorn.Config(app, http=Http11Protocol, ws="none", log_config=None, timeout_graceful_shutdown=2)
    return in_thread(uvicorn.Server(config))


@contextmanager
def in_thread(server: uvicorn.Server):
    """Run the server in a thread until the block ends; its address."""
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield "http://{}:{}".format(*listener.getsockname())
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


@contextmanager
def serving(failure: str | None = None, *, loading: bool = False, **config: Any):
    """Run the app over a fake engine, in a thread, until the block ends."""
    engines: list[FakeEngine] = []

    def build(deliver: Any) -> FakeEngine:
        engines.append(FakeEngine(deliver))
        engines[0].failure = failure
        if loading:
            engines[0].may_load.clear()
        return engines[0]

    app = create_app(AsyncEngine(build, Metrics()), tokenizer(), ServeConfig(**config))
    with listening(app) as url:
        served = Served(engines[0], url)
        try:
            if not loading:
                served.until("/health", 503) if failure else served.until("/ready", 200)
            yield served
        finally:
            served.http.close()


def events(response: httpx.Response) -> list[Any]:
    """The JSON of each server-sent event; the last must be [DONE]."""
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]
