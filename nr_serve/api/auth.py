"""Keys: one for inference, one for changing adapters. Checked before anything of a body is read."""

from __future__ import annotations

import hmac

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nr_serve.api.errors import error_response
from nr_serve.errors import Forbidden, NrError, Unauthorized

_GUARDED = ("/v1", "/tokenize", "/detokenize")
_ADAPTERS = "/v1/adapters"
_LORA = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class KeyCheck:
    """ASGI middleware that lets a request through only with the key it needs.

    The admin key opens everything. With only an API key set, that key guards adapter changes too.
    """

    def __init__(self, app: ASGIApp, api_key: SecretStr | None, admin_key: SecretStr | None) -> None:
        self._app = app
        self._api_key = api_key.get_secret_value() if api_key else None
        self._admin_key = admin_key.get_secret_value() if admin_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key, then pass the request on."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> NrError | None:
        given = _bearer(Headers(scope=scope).get("authorization", ""))
        if changes_adapters(scope["method"], scope["path"]):
            return self._admin_refusal(given)
        if self._api_key is None or not _under(scope["path"], _GUARDED):
            return None
        if _same(given, self._api_key) or _same(given, self._admin_key):
            return None
        return _unauthorized(given)

    def _admin_refusal(self, given: str | None) -> NrError | None:
        wanted = self._admin_key or self._api_key
        if wanted is None or _same(given, wanted):
            return None
        if _same(given, self._api_key):
            return Forbidden("this key may not change adapters; the admin key is needed")
        return _unauthorized(given)


def changes_adapters(method: str, path: str) -> bool:
    """Whether a request may change which adapters are served."""
    return method not in ("GET", "HEAD", "OPTIONS") and _under(path, (_ADAPTERS, *_LORA))


def _under(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(f"{root}/") for root in roots)


def _bearer(header: str) -> str | None:
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _same(given: str | None, wanted: str | None) -> bool:
    if given is None or wanted is None:
        return False
    # Header values are bytes, shown as latin-1; a key that is not ASCII is sent as UTF-8.
    return hmac.compare_digest(given.encode("latin-1"), wanted.encode())


def _unauthorized(given: str | None) -> Unauthorized:
    if given is None:
        return Unauthorized("an API key is needed: send `Authorization: Bearer KEY`")
    return Unauthorized("Incorrect API key provided")
