"""A base and its adapters in this process: the server without HTTP, for notebooks and for files of requests.

The app that `serve` runs is called through ASGI, without a socket: the same code checks and answers requests.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import httpx
from anyio.from_thread import BlockingPortal
from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from nr_serve.api.responses import Adapter, AdapterList, ChatCompletion, Completion, ModelList
from nr_serve.client import adapter_path, error_from, refusal
from nr_serve.config import FLAGS, GROUPS, AdapterSettings, EngineSettings, ModelSettings, ServeConfig
from nr_serve.errors import BadRequest, NotFound, Unavailable, faults
from nr_serve.in_process import local_http, post, stream

C = TypeVar("C", bound=BaseSettings)
T = TypeVar("T")


class OfflineConfig(EngineSettings, AdapterSettings, ModelSettings, BaseSettings):
    """The settings of `serve` that apply without HTTP."""

    model_config = FLAGS | SettingsConfigDict(env_prefix="NR_", frozen=True)

    def serve_config(self) -> ServeConfig:
        """The settings for the app: the process's own user needs no key, and may load any file they can read.

        Raises BadRequest.
        """
        # Passed explicitly, so that a server's settings in the environment are ignored.
        others = {
            name: field.get_default(call_default_factory=True)
            for group in GROUPS
            if not issubclass(OfflineConfig, group)
            for name, field in group.model_fields.items()
        }
        given = self.model_dump(include=set(ServeConfig.model_fields))
        return _checked(ServeConfig, others | given | {"adapter_dir": [Path("/")], "log_level": "warning"})


@dataclass(frozen=True)
class Answer:
    """An answer; `str()` of it is its text."""

    texts: tuple[str, ...]
    """One text for each prompt and each of `n`."""
    body: Mapping[str, Any]
    """The whole answer, in OpenAI's format."""

    @property
    def text(self) -> str:
        """The text; the first one, if there are several."""
        return self.texts[0]

    def __str__(self) -> str:
        return self.text


class Server:
    """A base with adapters, on threads of its own. Can be called from any thread; refusals are raised as NrError.

    Close it, or use it in a `with` block.
    """

    def __init__(self, adapters: str | Path | Sequence[str | Path] | None = None, **settings: Any) -> None:
        """Return once the base is loaded and `adapters` are attached: one or several, each FILE or NAME=FILE.

        `settings` are those of `nr-serve serve`, except HTTP's. Raises BadRequest if one is wrong, and NrError if
        the base or an adapter cannot be served.
        """
        if adapters is not None:
            if "adapter" in settings:
                raise BadRequest("adapter: the adapters are given already, as `adapters`", param="adapter")
            several = [adapters] if isinstance(adapters, str | Path) else adapters
            settings["adapter"] = [str(adapter) for adapter in several]
        for name in settings.keys() - OfflineConfig.model_fields.keys() & ServeConfig.model_fields.keys():
            raise BadRequest(f"{name}: this setting is for serving over HTTP; there is none here", param=name)
        config = _checked(OfflineConfig, settings).serve_config()
        self._process = os.getpid()
        self._standing: set[AsyncGenerator[dict[str, Any], None]] = set()
        """Streams that have begun, while nobody waits for their next piece."""
        with ExitStack() as stack:
            self._portal = stack.enter_context(_Loop())
            self._http = stack.enter_context(self._portal.wrap_async_context_manager(local_http(config)))
            self._open: ExitStack | None = stack
            models: ModelList = self._get("/v1/models")
            self.model = models["data"][0]["id"]
            """The base's name; as `model` it lets every attached adapter act."""
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        if self._is_behind():
            self._open = None
        if self._open is not None:
            for events in list(self._standing):
                self._run(events.aclose)
            stack, self._open = self._open, None
            stack.close()

    def complete(self, prompt: str | Sequence[str] | Sequence[int], **fields: Any) -> Answer:
        """Continue a text, or several; `fields` are any of POST /v1/completions except `stream`."""
        body: Completion = self._post("/v1/completions", self._body(fields, prompt=prompt))
        return Answer(tuple(choice["text"] for choice in body["choices"]), body)

    def chat(self, messages: str | Sequence[Mapping[str, Any]], **fields: Any) -> Answer:
        """Answer a conversation, or one message; `fields` are any of POST /v1/chat/completions except `stream`."""
        asked = self._body(fields, messages=_messages(messages))
        body: ChatCompletion = self._post("/v1/chat/completions", asked)
        return Answer(tuple(choice["message"]["content"] or "" for choice in body["choices"]), body)

    def stream(self, prompt: str | Sequence[int], **fields: Any) -> Iterator[str]:
        """Continue a text; yield the answer in pieces, as it is generated. `fields` are those of `complete`.

        Leaving the loop early, by `break`, stops generating the answer.
        """
        for choice in self._choices("/v1/completions", self._body(fields, prompt=prompt)):
            yield choice["text"]

    def stream_chat(self, messages: str | Sequence[Mapping[str, Any]], **fields: Any) -> Iterator[str]:
        """Answer a conversation, or one message, in pieces; see `stream`."""
        for choice in self._choices("/v1/chat/completions", self._body(fields, messages=_messages(messages))):
            if choice["delta"].get("content"):
                yield choice["delta"]["content"]

    def gates(self, text: str, **fields: Any) -> list[tuple[str, dict[str, float]]]:
        """Each token of a text, with the share of each adapter's blocks that fired at it, by adapter name."""
        if not isinstance(text, str):
            raise BadRequest("the gates of one text are told at a time", param="text")
        answer = self.complete(text, **{"max_tokens": 0, "gates": True} | fields)
        gates = answer.body["choices"][0]["gates"]
        return list(zip(gates["prompt_text"], gates["prompt"], strict=True))

    def adapters(self) -> list[Adapter]:
        """Every registered adapter."""
        found: AdapterList = self._get("/v1/adapters")
        return found["data"]

    def load_adapter(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        replace: bool = False,
        pinned: bool | None = None,
        threshold: float | None = None,
        routed: bool | None = None,
    ) -> Adapter:
        """Load an adapter's file; `name` defaults to the file's. Return the adapter.

        With `pinned` or `routed` None, it is what the one that it replaces is; with `threshold` None, the file's is
        used. One that is not `routed` acts where it is named alone.
        """
        path = Path(path).absolute()
        if not path.exists():
            raise NotFound(f"there is no file {path}")
        body = {"name": name or path.stem, "path": str(path), "replace": replace}
        dials = {"pinned": pinned, "threshold": threshold, "routed": routed}
        adapter: Adapter = self._post("/v1/adapters", body | dials)
        return adapter

    def unload_adapter(self, name: str) -> Adapter:
        """Unload an adapter; return its last state."""
        adapter: Adapter = self._json(self._http.delete, adapter_path(name))
        return adapter

    def _body(self, fields: Mapping[str, Any], **asked: Any) -> dict[str, Any]:
        """A request's body. One adapter's name stands for a list of it, as when the server is made."""
        body = {"model": self.model, **asked, **fields}
        if isinstance(body.get("adapters"), str):
            body["adapters"] = [body["adapters"]]
        return body

    def _get(self, path: str) -> Any:
        return self._json(self._http.get, path)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        if body.get("stream"):
            raise BadRequest("`stream` is a method of its own here", param="stream")
        return self._json(post, self._http, path, body)

    def _choices(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The choices of a stream of one answer. Raises BadRequest if there would be several answers."""
        if body.get("stream") is False:
            raise BadRequest("what is not streamed is asked for with `complete` or `chat`", param="stream")
        for field in ("n", "prompt"):
            if _several(body.get(field)):
                raise BadRequest("one answer can be streamed; ask for several with `complete`", param=field)
        events = stream(self._http, path, {**body, "stream": True})
        try:
            while True:
                # A stream that is interrupted while it computes ends by itself, and cannot be closed.
                self._standing.discard(events)
                event = self._run(anext, events, None)
                self._standing.add(events)
                if event is None:
                    return
                if "error" in event:
                    raise error_from(event["error"], event["error"]["code"])
                yield from event["choices"]
        finally:
            if events in self._standing:
                self._standing.discard(events)
                if self._open is not None and not self._is_behind():
                    self._run(events.aclose)

    def _run(self, ask: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run on the server's event loop, and wait for the result."""
        if self._open is None:
            raise Unavailable("the server is closed")
        if self._is_behind():
            raise Unavailable("the server lives in the process that this one was forked from; begin one here")
        future = self._portal.start_task_soon(ask, *args)
        try:
            return future.result()
        except BaseException:  # an interrupted notebook cell drops its request
            future.cancel()
            raise

    def _is_behind(self) -> bool:
        """Whether this process was forked from the one in which the server's threads run."""
        return os.getpid() != self._process

    def _json(self, ask: Callable[..., Awaitable[httpx.Response]], *args: Any) -> Any:
        response = self._run(ask, *args)
        if response.is_error:
            raise refusal(response)
        return response.json()


class _Loop:
    """An event loop on a daemon thread, so that a program can end without it; the block gets the portal to it."""

    def __enter__(self) -> BlockingPortal:
        begun: Future[BlockingPortal] = Future()

        async def serve() -> None:
            async with BlockingPortal() as portal:
                begun.set_result(portal)
                await portal.sleep_until_stopped()

        self._thread = threading.Thread(target=anyio.run, args=(serve,), name="nr-server", daemon=True)
        self._thread.start()
        self._portal = begun.result()
        return self._portal

    def __exit__(self, *_: object) -> None:
        self._portal.call(self._portal.stop)
        self._thread.join()


def _messages(given: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _several(asked: Any) -> bool:
    """Whether an `n` is more than 1, or a `prompt` more than one text or list of token ids."""
    if isinstance(asked, list | tuple):
        return len(asked) > 1 and not isinstance(asked[0], int)
    return isinstance(asked, int) and asked > 1


def _checked(kind: type[C], settings: Mapping[str, Any]) -> C:
    try:
        return kind(**settings)
    except ValidationError as error:
        raise BadRequest(faults(error)) from error
