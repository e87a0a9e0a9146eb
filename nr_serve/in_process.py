"""Calls the app in this process, without HTTP: a client of the app, and the requests made through it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Scope

from nr_serve.client import refusal
from nr_serve.config import ServeConfig
from nr_serve.errors import BadRequest, NrError

log = logging.getLogger(__name__)

_Parts = asyncio.Queue[bytes | None]  # None marks the end


@asynccontextmanager
async def local_http(config: ServeConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server's app, run in this process, with its base loaded and its adapters attached.

    Raises NrError if that fails.
    """
    from nr_serve.assemble import assemble  # imports torch, which help must not wait for

    engine, app = await asyncio.to_thread(assemble, config)
    settled = asyncio.Event()
    engine.on_status = lambda status: settled.set()
    async with app.router.lifespan_context(app):
        await settled.wait()
        if engine.status != "ready":
            raise NrError(engine.failure or "the engine failed to start")
        async with httpx.AsyncClient(
            transport=LocalTransport(app), base_url="http://localhost", timeout=None
        ) as http:
            yield http


async def post(http: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> httpx.Response:
    """POST `body`; while the queue is full, wait and ask again. Raises BadRequest for what cannot be JSON."""
    async with _posted(http, path, body) as response:
        await response.aread()
        return response


async def stream(
    http: httpx.AsyncClient, path: str, body: Mapping[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """POST `body` as `post` does, and yield the answer's events. Raises the error if the request is refused."""
    async with _posted(http, path, body) as response:
        if response.is_error:
            await response.aread()
            raise refusal(response)
        try:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))
        except httpx.ReadError as error:
            raise NrError(str(error)) from error


@asynccontextmanager
async def _posted(http: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> AsyncIterator[httpx.Response]:
    try:
        content = json.dumps(body, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"this cannot be sent as JSON: {error}") from error
    while True:
        async with http.stream(
            "POST", path, content=content, headers={"Content-Type": "application/json"}
        ) as response:
            if response.status_code != 429:
                yield response
                return
            wait_s = float(response.headers["Retry-After"])
        await asyncio.sleep(wait_s)


class LocalTransport(httpx.AsyncBaseTransport):
    """Sends requests to `app` in this event loop, and hands answers on as they come.

    Closing a response early ends its request, like a client that goes away.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request; return the response once it has begun."""
        body = [await request.aread()]
        begun: asyncio.Queue[Message | None] = asyncio.Queue()
        parts: _Parts = asyncio.Queue()

        async def receive() -> Message:
            if not body:
                await asyncio.Event().wait()  # a client that goes away cancels the task
            return {"type": "http.request", "body": body.pop(), "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.put_nowait(message)
            elif message.get("body"):
                parts.put_nowait(message["body"])

        async def ask() -> None:
            try:
                await self._app(_scope(request), receive, send)
            finally:
                begun.put_nowait(None)
                parts.put_nowait(None)

        answer = _Answer(parts, asyncio.ensure_future(ask()))
        try:
            start = await begun.get()
        except asyncio.CancelledError:
            await answer.aclose()
            raise
        if start is None:
            await answer.end()
            raise httpx.RemoteProtocolError("the app gave no answer", request=request)
        return httpx.Response(start["status"], headers=start["headers"], stream=answer)


class _Answer(httpx.AsyncByteStream):
    """The parts of a response, as the app sends them."""

    def __init__(self, parts: _Parts, task: asyncio.Future[None]) -> None:
        self._parts = parts
        self._task = task

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (part := await self._parts.get()) is not None:
            yield part
        await self.end()

    async def end(self) -> None:
        """Wait until the app has finished. Raises httpx.ReadError if the app failed."""
        try:
            await self._task
        except Exception as error:
            log.exception("a bug")
            raise httpx.ReadError("the answer broke off; the log has the details") from error

    async def aclose(self) -> None:
        """Cancel the request, if it has not ended."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def _scope(request: httpx.Request) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.split(b"?")[0],
        "query_string": request.url.query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "client": ("127.0.0.1", 0),
        "server": (request.url.host, request.url.port),
    }
