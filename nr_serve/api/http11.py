"""HTTP/1.1 as uvicorn speaks it. A client that sends no HTTP, or stops sending, is told so in the API's form."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nr_serve.api.errors import error_body
from nr_serve.errors import BadRequest, NrError, SentTooSlowly

READ_SECONDS = 30.0
"""For the whole head of a request, and between two parts of its body."""
_THEY_SEND = (h11.IDLE, h11.SEND_BODY)


class Http11Protocol(H11Protocol):
    """One connection. It ends if a request is not sent in time: a server has only so many."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """A client sent something."""
        in_head = self.conn.their_state is h11.IDLE
        super().data_received(data)
        if self._timer is not None and in_head and self.conn.their_state is h11.IDLE:
            return  # a head that comes in drops has no more time than another
        self._stop_waiting()
        if self.conn.their_state in _THEY_SEND:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client, or we, ended it."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(BadRequest("this is not an HTTP/1.1 request"))

    def _should_upgrade(self) -> bool:
        return False  # an upgrade may be ignored: it is answered as the request that it is

    def _wait(self) -> None:
        self._timer = self.loop.call_later(READ_SECONDS, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.flow.read_paused:  # the client would send, if we would read
            self._wait()
        elif self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # it asked nothing
        else:
            self._refuse(SentTooSlowly(f"the request did not come within {READ_SECONDS:g} seconds"))

    def _refuse(self, error: NrError) -> None:
        """Answer, unless an answer has begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body(error)).encode()
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            reason = HTTPStatus(error.status).phrase.encode()
            headers.append(("Connection", "close"))
            head = h11.Response(status_code=error.status, headers=headers, reason=reason)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
