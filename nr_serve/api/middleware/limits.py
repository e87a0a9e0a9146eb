"""Limits on how large a body may be, and on how much one key may ask."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nr_serve.api.errors import error_response
from nr_serve.api.paths import asks_model
from nr_serve.config import ServeConfig
from nr_serve.errors import BadRequest, RateLimited, TooLarge
from nr_serve.keys import Key


class BodyLimit:
    """ASGI middleware that refuses bodies over `max_bytes`, except uploads by PUT, which have their own limit."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting the bytes of its body."""
        if scope["type"] == "http" and {"content-length", "transfer-encoding"}.issubset(Headers(scope=scope)):
            # A proxy before us may use the other header: what follows the body could be smuggled past it as a
            # request.
            refusal = error_response(BadRequest("a body has either Content-Length or Transfer-Encoding"))
            refusal.headers["Connection"] = "close"
            await refusal(scope, receive, send)
        elif scope["type"] != "http" or scope["method"] == "PUT":
            await self._app(scope, receive, send)
        elif _announced(scope) > self._max_bytes:
            await error_response(TooLarge(self._message()))(scope, receive, send)
        else:
            await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_bytes:
                # FastAPI turns other errors raised while it reads a body into a plain 400.
                raise HTTPException(TooLarge.status, self._message())
            return message

        return counted

    def _message(self) -> str:
        return f"the body is larger than {self._max_bytes:,} bytes"


def _announced(scope: Scope) -> int:
    length = Headers(scope=scope).get("content-length", "0")
    return int(length) if length.isdecimal() else 0


class KeyLimits:
    """ASGI middleware that refuses requests to the model beyond a key's limits.

    A request counts as one answer until its route calls `scope["state"]["take_answers"]` with their number.
    All who ask without a key share one set of limits.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, now: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._per_minute = config.key_requests_per_minute
        self._at_once = config.key_requests_at_once
        self._now = now
        self._under_way: Counter[str] = Counter()
        self._buckets: dict[str, TokenBucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if its key's limits allow it."""
        if scope["type"] != "http" or not asks_model(scope):
            await self._app(scope, receive, send)
            return
        key: Key | None = scope["state"]["key"]
        name = "" if key is None else key.name
        error = self._refusal(name, key)
        if error is not None:
            await error_response(error)(scope, receive, send)
            return
        taken = 1

        def take_answers(answers: int) -> None:
            """Raises BadRequest if the key may never have this many, RateLimited if others must end before."""
            nonlocal taken
            most = self._most(key)
            if most is not None and answers > most:
                raise BadRequest(f"this asks for {answers} answers; this key may have {most} under way")
            if most is not None and self._under_way[name] - taken + answers > most:
                raise _too_many(most)
            self._under_way[name] += answers - taken
            taken = answers

        scope["state"]["take_answers"] = take_answers
        self._under_way[name] += taken
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way[name] -= taken

    def _most(self, key: Key | None) -> int | None:
        return (key and key.requests_at_once) or self._at_once

    def _refusal(self, name: str, key: Key | None) -> RateLimited | None:
        most = self._most(key)
        if most is not None and self._under_way[name] >= most:
            return _too_many(most)
        per_minute = (key and key.requests_per_minute) or self._per_minute
        if per_minute is None:
            return None
        wait_s = self._buckets.setdefault(name, TokenBucket(self._now)).take(per_minute)
        if wait_s == 0:
            return None
        message = f"this key may send {per_minute:g} requests a minute"
        return RateLimited(message, retry_after_s=math.ceil(wait_s))


def _too_many(most: int) -> RateLimited:
    return RateLimited(f"this key may have {most} answers under way; wait for one to end")


class TokenBucket:
    """Holds at most one minute's worth of requests, and refills steadily."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._tokens = math.inf  # full, whatever the bucket's size
        self._at = now()

    def take(self, per_minute: float) -> float:
        """Take a token and return 0, or return the number of seconds until one is there."""
        now = self._now()
        filled = self._tokens + (now - self._at) * per_minute / 60
        self._tokens, self._at = min(filled, max(per_minute, 1.0)), now
        if self._tokens < 1:
            return (1 - self._tokens) * 60 / per_minute
        self._tokens -= 1
        return 0.0
