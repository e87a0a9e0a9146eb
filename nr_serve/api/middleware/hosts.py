"""Under which names the server may be asked: a page of another site that has its name point here is turned away.

A browser lets such a page read the answers (DNS rebinding): it takes the server for the page's own. What it cannot
do is ask for an address instead of its name.
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
    """ASGI middleware that refuses requests for another host than the allowed ones."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._allowed = {_bare(name) for name in (config.host, *config.allowed_host)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, if it is for this server."""
        if scope["type"] == "http" and not self._is_ours(Headers(scope=scope).get("host", "")):
            error = BadRequest("this server is not asked under this name (--allowed-host)", param="Host")
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_ours(self, header: str) -> bool:
        host = _name(header)
        # An address is no name that a site could point anywhere.
        return host == "localhost" or address(host) is not None or host in self._allowed


def checks_hosts(config: ServeConfig) -> bool:
    """Whether hosts are checked: where names are set, or where the loopback is all that keeps others out."""
    if config.allowed_host:
        return ANY not in config.allowed_host
    return config.api_key is None and config.key_file is None and is_loopback(config.host)


def _name(header: str) -> str:
    """The host of a Host header, without its port; "" if that is no host."""
    found = _HOST.fullmatch(header)
    return "" if found is None else _bare(found[1])


def _bare(host: str) -> str:
    """A host as it is compared: names have no case, and addresses no brackets."""
    return host.lower().strip("[]")
