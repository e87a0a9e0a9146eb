"""An httpx transport that calls an app in this event loop, and hands answers on as they come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import httpx
from starlette.types import ASGIApp, Message, Scope

log = logging.getLogger(__name__)

_Parts = asyncio.Queue[bytes | None]  # None: there are no more


class LocalTransport(httpx.AsyncBaseTransport):
    """Asks `app`. An answer that is closed before its end ends the request, as a client that goes away does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Ask, and return the answer once it has begun."""
        body = [await request.aread()]
        begun: asyncio.Queue[Message | None] = asyncio.Queue()
        parts: _Parts = asyncio.Queue()

        async def receive() -> Message:
            if not body:
                await asyncio.Event().wait()  # who goes away cancels the task
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
    """The parts of an answer, as the app sends them."""

    def __init__(self, parts: _Parts, task: asyncio.Future[None]) -> None:
        self._parts = parts
        self._task = task

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (part := await self._parts.get()) is not None:
            yield part
        await self.end()

    async def end(self) -> None:
        """Return once the app has. Raises httpx.ReadError if it failed."""
        try:
            await self._task
        except Exception as error:
            log.exception("a bug")
            raise httpx.ReadError("the answer broke off; the log has the details") from error

    async def aclose(self) -> None:
        """End the request, if it has not ended."""
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
