"""Checks the Host header, so that pages of other sites cannot read answers by DNS rebinding.

A page of another site can have its own host name point at this server. The browser then takes the server for that
site, and lets the page read the answers. The page cannot make the browser send an IP address as the host instead.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nr_serve.addresses import address, is_loopback
from nr_serve.api.errors import error_response
from nr_serve.config import ServeConfig
from nr_serve.errors import BadRequest

ANY = "*"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/]+)(:[0-9]*)?")


class HostCheck:
    """ASGI middleware that refuses requests whose host is not allowed."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._allowed = {_bare(name) for name in (config.host, *config.allowed_host)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if its host is allowed."""
        if scope["type"] == "http" and not self._is_ours(Headers(scope=scope).get("host", "")):
            error = BadRequest("unknown host name; `--allowed-host` allows it", param="Host")
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_ours(self, header: str) -> bool:
        host = _name(header)
        # No site can make an IP address point elsewhere.
        return host == "localhost" or address(host) is not None or host in self._allowed


def checks_hosts(config: ServeConfig) -> bool:
    """Whether hosts are checked: if names are set, or if listening on the loopback is the only protection."""
    if config.allowed_host:
        return ANY not in config.allowed_host
    return not config.needs_key and is_loopback(config.host)


def _name(header: str) -> str:
    """The host of a Host header, without its port; "" if the header is not valid."""
    found = _HOST.fullmatch(header)
    return "" if found is None else _bare(found[1])


def _bare(host: str) -> str:
    """A host in the form used for comparing: lower case, and without an address's brackets."""
    return host.lower().strip("[]")
