"""`nr-serve serve`: the port first, then the base, the engine and the app, until a signal ends it."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from nr_serve.addresses import is_loopback
from nr_serve.api.bridge import AsyncEngine
from nr_serve.api.http11 import Http11Protocol
from nr_serve.api.middleware.deadlines import SEND_SECONDS
from nr_serve.api.underway import Underway
from nr_serve.assemble import assemble
from nr_serve.config import ServeConfig
from nr_serve.engine.messages import Status
from nr_serve.errors import NrError
from nr_serve.logs import configure_logging, quiet_progress_bars

log = logging.getLogger(__name__)
_CLOSING_SECONDS = 2
"""Time for sending the last data after every answer has ended."""


def serve(config: ServeConfig) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code. Raises NrError if it cannot start, or failed."""
    signal.signal(signal.SIGTERM, _end)
    configure_logging(config.log_level, config.log_format)
    if config.log_format == "text":
        return _serve(config)
    try:
        return _serve(config)
    except NrError as error:  # the command line would print it as text, not JSON
        log.error(error.message)
        return 1


def _serve(config: ServeConfig) -> int:
    _check_reach(config)
    with bind(config.host, config.port) as listener:
        quiet_progress_bars(config.log_level, config.log_format)
        log.info("starting with the base %s", config.model)
        engine, app = assemble(config)
        server = HttpServer(app, app.state.context.underway, config.grace_period)
        announcer = _Announcer(engine, server, _address(listener), config.log_format)
        engine.on_status = announcer.turned
        try:
            server.run(sockets=[listener])
        except SystemExit:  # by SIGTERM
            if announcer.failure is None:
                raise
        finally:
            gc.unfreeze()  # so that the end of the process finds nothing left over
    if announcer.failure is not None:
        raise announcer.failure
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises NrError if the port is taken or the host is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm only on sockets created with IPPROTO_TCP; else each chunk could wait 40
    # ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: closes the connection of a client that reads nothing
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SEND_SECONDS * 1000))
        listener.bind((host, port))
        # Listening from the start keeps a second server off the port; clients wait until this one accepts.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise NrError(f"cannot listen on {host} port {port}: {error.strerror or error} (--port)") from error
    return listener


class HttpServer(uvicorn.Server):
    """On the first signal, refuses new requests and lets answers finish; on a second one, ends at once."""

    def __init__(self, app: FastAPI, underway: Underway, grace_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Http11Protocol,
                ws="none",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_CLOSING_SECONDS,
                server_header=False,
            )
        )
        self._engine: AsyncEngine = app.state.context.engine
        self._underway = underway
        self._grace_s = grace_s
        self._told: str | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal to end."""
        if self.should_exit:
            os._exit(128 + sig)
        self._told = signal.Signals(sig).name
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain while the socket still accepts connections, so that new clients get 503; then close."""
        if self._told is not None:  # not logged in the signal handler, which may interrupt another log line
            running = self._underway.running
            log.info("stopping on %s: running requests: %d, grace: %g s", self._told, running, self._grace_s)
        await self._underway.drain(self._grace_s)
        if self._engine.status == "loading":
            log.info("stopped")
            _leave()
        await super().shutdown(sockets)
        log.info("stopped")


class _Announcer:
    """Reports when the server is ready, and ends it if the engine cannot start."""

    def __init__(self, engine: AsyncEngine, server: uvicorn.Server, address: str, form: str) -> None:
        self._engine = engine
        self._server = server
        self._address = address
        self._form = form
        self._was_ready = False
        self.failure: NrError | None = None

    def turned(self, status: Status) -> None:
        """Handle a change of the engine's status."""
        if status == "ready":
            # What was loaded stays: a later collection that went through all of it would hold up every stream for a
            # quarter of a second.
            gc.collect()
            gc.freeze()
            self._was_ready = True
            self._say_ready()
        elif status == "failed" and not self._was_ready:
            self.failure = NrError(self._engine.failure or "the engine failed to start")
            self._server.should_exit = True
        elif status == "failed":
            # The process stays alive and answers 503: a supervisor that restarts it reads /health.
            self.failure = NrError(f"the engine failed: {self._engine.failure}")
            if self._form == "json":
                log.error(self.failure.message)
            else:
                print(f"error: {self.failure.message}", file=sys.stderr, flush=True)

    def _say_ready(self) -> None:
        info, adapters = self._engine.info, self._engine.adapters
        if self._form == "json":
            fields = {"model": info.model, "address": self._address, "device": info.device, "dtype": info.dtype}
            log.info("ready", extra={"fields": {**fields, "adapters": list(adapters)}})
            return
        with_adapters = f"adapters: {', '.join(adapters)}" if adapters else "no adapter loaded"
        print(
            f"ready: {info.model} on {self._address} ({info.device}, {info.dtype}; {with_adapters})",
            flush=True,
        )


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _check_reach(config: ServeConfig) -> None:
    """Log who can reach the server without a key; raise NrError if other machines can and it was not allowed."""
    if config.needs_key:
        return
    if is_loopback(config.host):
        log.info("no key is set: only this machine can reach the server")
    elif config.allow_no_key:
        change = "" if config.admin_key else " and change its adapters"
        log.warning("no key is set: anyone who reaches %s may use this server%s", config.host, change)
    else:
        raise NrError(
            f"--host {config.host} can be reached from other machines, and no key is set: give --api-key or "
            "--key-file, or --allow-no-key if that is what you want"
        )


def _leave() -> None:
    """End the process at once with success: loading a base cannot be interrupted, and nobody waits for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end(signum: int, frame: object) -> None:
    # uvicorn raises the signal again after an orderly shutdown: that is a normal end.
    raise SystemExit(0)
