"""The largest body taken. Adapter files, which are streamed to disk, have a limit of their own."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nr_serve.api.errors import error_response
from nr_serve.errors import TooLarge

MAX_JSON_BYTES = 16 * 2**20


class BodyLimit:
    """ASGI middleware that refuses bodies over `max_bytes`, except uploads by PUT."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_JSON_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting its body."""
        if scope["type"] != "http" or scope["method"] == "PUT":
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
                # FastAPI hides other errors raised while it reads a body behind a plain 400.
                raise HTTPException(TooLarge.status, self._message())
            return message

        return counted

    def _message(self) -> str:
        return f"the body is larger than {self._max_bytes:,} bytes"


def _announced(scope: Scope) -> int:
    length = Headers(scope=scope).get("content-length", "0")
    return int(length) if length.isdecimal() else 0
