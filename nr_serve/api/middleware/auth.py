"""Lets a request through only with the key it needs. Checked before any of the body is read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nr_serve.api.errors import error_response
from nr_serve.api.paths import changes_adapters, is_guarded
from nr_serve.api.request_state import CALLER
from nr_serve.errors import Forbidden, NrError, Unauthorized
from nr_serve.keys import Key, Keys


class KeyCheck:
    """ASGI middleware; leaves the request's key, or None, in `scope["state"]["key"]`.

    And in `"admin"` whether it may do what an admin key may.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key, then pass the request on."""
        if scope["type"] != "http" or not is_guarded(scope):
            await self._app(scope, receive, send)
            return
        given = _bearer(Headers(scope=scope).get("authorization", ""))
        key = None if given is None else self._keys.find(given)
        error = self._refusal(scope, given, key)
        if error is not None:
            await error_response(error)(scope, receive, send)
            return
        admin = not self._keys.guards_changes or (key is not None and key.role == "admin")
        scope.setdefault("state", {}).update(key=key, admin=admin)
        CALLER.set(_address(scope) if key is None else key.name)
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, given: bytes | None, key: Key | None) -> NrError | None:
        change = changes_adapters(scope)
        if not (self._keys.guards_changes if change else self._keys.guards_inference):
            return None
        if given is None:
            return Unauthorized("an API key is needed: send `Authorization: Bearer KEY`")
        if key is None:
            return Unauthorized("Incorrect API key provided")
        if change and key.role != "admin":
            return Forbidden(
                "this key may not change adapters; an admin key is needed (nr-serve make-key --role admin)"
            )
        return None


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return f"[{client[0] if client else ''}]"  # in brackets, so that it differs from every key's name


def _bearer(header: str) -> bytes | None:
    scheme, _, key = header.partition(" ")
    key = key.strip(" \t")
    # Header values are bytes, decoded as latin-1; clients send a key that is not ASCII as UTF-8.
    return key.encode("latin-1") if scheme.lower() == "bearer" and key else None
