"""Server-sent events: chunks as they come, a last `[DONE]`, and nothing left running when the client goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from nr_serve.api.encode import in_parts
from nr_serve.api.errors import error_body
from nr_serve.errors import NrError

T = TypeVar("T")
Body = Mapping[str, object]
DONE = b"data: [DONE]\n\n"


def event(body: Body) -> bytes:
    """One event, in ASCII: httpx's clients also end lines at U+2028 and similar characters."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def large_event(body: Body) -> bytes:
    """The same of a large body."""
    return b"data: " + in_parts(body) + b"\n\n"


class EventStream(Response):
    """Sends `first` and then `rest`, which has begun, as events; closes it at the end, or when the client goes.

    What is bytes in them is an event already.
    """

    media_type = "text/event-stream"

    def __init__(self, first: Body | bytes, rest: AsyncGenerator[Body | bytes, None]) -> None:
        self._first = first
        self._rest = rest
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; stop when the client goes away."""
        try:
            await while_connected(receive, self._send(_to_client(send)))
        except ClientDisconnect:
            return  # there is nobody to report it to
        finally:
            await self._rest.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._send_event(send, self._first)
        last = DONE
        try:
            async for body in self._rest:
                await self._send_event(send, body)
        except NrError as error:
            last = event(error_body(error))
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_event(self, send: Send, body: Body | bytes) -> None:
        data = body if isinstance(body, bytes) else event(body)
        await send({"type": "http.response.body", "body": data, "more_body": True})


def _to_client(send: Send) -> Send:
    """`send`, with the connection's errors as ClientDisconnect; our own errors pass unchanged."""

    async def sent(message: Message) -> None:
        try:
            await send(message)
        except OSError as error:
            raise ClientDisconnect from error

    return sent


async def while_connected(receive: Receive | Request, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it and raise ClientDisconnect as soon as the client goes away.

    Call it only once the request's body has been read: then the next message can only be the disconnect.
    """
    gone = asyncio.ensure_future(_disconnect(receive.receive if isinstance(receive, Request) else receive))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
