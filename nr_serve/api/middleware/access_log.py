"""One line of log for each request, under an id that the client may choose and gets back."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nr_serve.api.errors import GONE, error_response, error_type
from nr_serve.api.request_state import ENTRY, Entry
from nr_serve.config import ServeConfig
from nr_serve.errors import NrError
from nr_serve.logs import REQUEST_ID
from nr_serve.metrics import Metrics
from nr_serve.tokenizer import Tokenizer

log = logging.getLogger(__name__)

HEADER = "X-Request-Id"
_CLEAN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_HEALTH = ("/health", "/ready", "/metrics")
_LONGEST_PATH = 200


class AccessLog:
    """The outermost ASGI middleware: names and logs requests, counts errors, answers for bugs in inner layers."""

    def __init__(self, app: ASGIApp, config: ServeConfig, tokenizer: Tokenizer, metrics: Metrics) -> None:
        self._app = app
        self._errors = metrics.http_errors
        self._log_health = config.log_health
        self._log_prompts = config.log_prompts
        self._tokenizer = tokenizer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, then log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry, name = Entry(), _request_id(scope)
        REQUEST_ID.set(name)
        ENTRY.set(entry)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception:
            if entry.status is not None:
                raise  # a part of the answer is sent: all that is left is to close the connection
            log.exception("a bug")
            # The client learns only that the fault is not its own.
            await error_response(NrError("internal error; the server's log has the details"))(scope, receive, named)
        finally:
            self._count(scope, entry.status)
            self._write(scope, entry)

    def _count(self, scope: Scope, status: int | None) -> None:
        """Count an error response, except of health probes and of clients that went away."""
        if status is not None and status >= 400 and status != GONE and scope["path"] not in _HEALTH:
            self._errors.labels(status, error_type(status)).inc()

    def _write(self, scope: Scope, entry: Entry) -> None:
        if scope["path"] in _HEALTH and not self._log_health:
            return
        # Logged undecoded: a decoded path may hold line breaks and forge log entries.
        path = scope["raw_path"].decode("ascii", "backslashreplace")[:_LONGEST_PATH]
        key = scope.get("state", {}).get("key")
        fields = {"method": scope["method"], "path": path, **entry.fields()}
        if key is not None:
            fields["key"] = key.name
        if self._log_prompts:
            fields["prompts"] = [self._tokenizer.decode(ids, special_tokens=True) for ids in entry.prompts]
        log.info("request", extra={"fields": fields})


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get(HEADER, "")
    return given if _CLEAN.fullmatch(given) else uuid.uuid4().hex
