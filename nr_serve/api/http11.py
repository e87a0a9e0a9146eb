"""uvicorn's HTTP/1.1 protocol with read timeouts, and with errors in the API's format."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nr_serve.api.errors import error_body
from nr_serve.errors import BadRequest, NrError, SentTooSlowly

READ_SECONDS = 30.0
"""Time limit for a request's whole head, and for each further part of its body."""
_THEY_SEND = (h11.IDLE, h11.SEND_BODY)


class Http11Protocol(H11Protocol):
    """One connection. It is closed if a request is not sent in time, because connections are limited."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for a new connection."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Handle received data, and restart or stop the timer."""
        in_head = self.conn.their_state is h11.IDLE
        super().data_received(data)
        if self._timer is not None and in_head and self.conn.their_state is h11.IDLE:
            return  # a head sent in small parts gets no more time than another
        self._stop_waiting()
        if self.conn.their_state in _THEY_SEND:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer when the connection is closed, by either side."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer data that is not HTTP with an error."""
        self._refuse(BadRequest("this is not an HTTP/1.1 request"))

    def _should_upgrade(self) -> bool:
        return False  # HTTP allows ignoring an upgrade and answering the request itself

    def _wait(self) -> None:
        self._timer = self.loop.call_later(READ_SECONDS, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.flow.read_paused:  # we do not read: the client is not to blame
            self._wait()
        elif self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # no request was begun
        else:
            self._refuse(SentTooSlowly(f"the request did not come within {READ_SECONDS:g} seconds"))

    def _refuse(self, error: NrError) -> None:
        """Send an error, unless a response has begun, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body(error)).encode()
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            reason = HTTPStatus(error.status).phrase.encode()
            headers.append(("Connection", "close"))
            head = h11.Response(status_code=error.status, headers=headers, reason=reason)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
