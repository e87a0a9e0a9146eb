"""Deadlines: ends requests after their time limit, and refuses new ones once the server shuts down."""

from __future__ import annotations

import asyncio
import logging
import math

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nr_serve.api.errors import error_body, error_response
from nr_serve.api.paths import asks_model, is_guarded
from nr_serve.api.sse import event
from nr_serve.api.underway import Underway
from nr_serve.errors import BadRequest, NrError, TimedOut, Unavailable

log = logging.getLogger(__name__)

HEADER = "X-Request-Timeout"
"""Header with a number of seconds; it may only shorten the server's own limit."""
SEND_SECONDS = 30.0
"""A client that reads nothing for so long is considered gone."""
_LAST_SECONDS = 1.0
"""Time for sending the error that ends a stream whose time is over."""


class Deadlines:
    """ASGI middleware that ends requests after their time, and refuses new ones while the server drains."""

    def __init__(self, app: ASGIApp, underway: Underway, timeout_s: float | None) -> None:
        self._app = app
        self._underway = underway
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with a deadline."""
        if scope["type"] != "http" or not is_guarded(scope):
            await self._app(scope, receive, send)
            return
        try:
            if self._underway.draining:
                raise Unavailable("the server is shutting down")
            seconds = _shorter(self._timeout_s, Headers(scope=scope).get(HEADER)) if asks_model(scope) else None
        except NrError as error:
            await error_response(error)(scope, receive, send)
        else:
            try:
                await self._run(scope, receive, send, seconds)
            except ClientDisconnect:
                log.info("a client stopped reading; its connection is closed")

    async def _run(self, scope: Scope, receive: Receive, send: Send, seconds: float | None) -> None:
        begun: Message | None = None
        whole = False

        async def watched(message: Message) -> None:
            nonlocal begun, whole
            begun = begun or message
            await _send(send, message, SEND_SECONDS)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        deadline = asyncio.timeout(seconds)

        async def heard() -> Message:
            message = await receive()
            if not message.get("more_body", False):
                self._underway.arrived(deadline)
            return message

        try:
            async with deadline:
                with self._underway.until(deadline):
                    if _has_body(scope):
                        self._underway.arriving(deadline)
                    await self._app(scope, heard, watched)
        except TimeoutError:
            if not deadline.expired():
                raise
            # The task was cancelled, which also aborted its requests in the engine.
            error = self._reason(seconds)

            async def last(message: Message) -> None:
                await _send(send, message, _LAST_SECONDS)

            if begun is None:
                await error_response(error)(scope, receive, last)
            elif _streams(begun) and not whole:
                await last({"type": "http.response.body", "body": event(error_body(error)), "more_body": False})

    def _reason(self, seconds: float | None) -> NrError:
        if self._underway.draining or seconds is None:
            return Unavailable("the server is shutting down")
        return TimedOut(f"the answer was not ready within {seconds:g} seconds")


async def _send(send: Send, message: Message, seconds: float) -> None:
    """Send a message. Raises ClientDisconnect if the client does not take it within `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await send(message)
    except TimeoutError as error:
        raise ClientDisconnect from error


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _streams(start: Message) -> bool:
    return Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream")


def _shorter(timeout_s: float | None, header: str | None) -> float | None:
    """The shorter of the server's and the client's limits. Raises BadRequest for an invalid header."""
    if header is None:
        return timeout_s
    try:
        asked = float(header)
    except ValueError:
        asked = math.nan
    if not 0 < asked < math.inf:
        raise BadRequest(f"{HEADER} is a number of seconds above 0", param=HEADER)
    return asked if timeout_s is None else min(asked, timeout_s)
