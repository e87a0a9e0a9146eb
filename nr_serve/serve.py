"""`nr-serve serve`: the port first, then the base, the engine and the app, until a signal ends it."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from nr_serve.api.app import create_app
from nr_serve.api.bridge import AsyncEngine, Deliver, Engine
from nr_serve.client import is_loopback
from nr_serve.config import ServeConfig
from nr_serve.engine.messages import Status
from nr_serve.errors import NrError, UnsupportedBase
from nr_serve.metrics import Metrics
from nr_serve.names import adapter_entry, check_adapter_name
from nr_serve.tokenizer import Tokenizer

GRACE_SECONDS = 30
"""How long running answers may go on after SIGTERM."""


def serve(config: ServeConfig) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code. Raises NrError if it cannot start."""
    signal.signal(signal.SIGTERM, _end)
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    _warn_if_open(config)
    with bind(config.host, config.port) as listener:
        model = _model_folder(config.model)
        for entry in config.adapter:
            check_adapter_name(adapter_entry(entry)[0], config.base_name(model))
        tokenizer = _tokenizer(model)
        engine = AsyncEngine(lambda deliver: _engine(config, model, tokenizer, deliver), Metrics())
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(engine, tokenizer, config),
                log_config=None,
                access_log=config.log_level == "debug",
                timeout_graceful_shutdown=GRACE_SECONDS,
                server_header=False,
            )
        )
        watch = _Watch(engine, server, _address(listener))
        engine.on_status = watch.turned
        logging.getLogger("uvicorn").setLevel("WARNING" if config.log_level == "info" else config.log_level.upper())
        server.run(sockets=[listener])
    if watch.failure is not None:
        raise watch.failure
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises NrError if the port is taken or the host is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only on sockets that name TCP: without it, each chunk could wait 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # Listening from the start keeps a second server off the port; clients wait until this one accepts.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise NrError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


class _Watch:
    """Says when the server is ready, and ends it if the engine cannot start."""

    def __init__(self, engine: AsyncEngine, server: uvicorn.Server, address: str) -> None:
        self._engine = engine
        self._server = server
        self._address = address
        self._was_ready = False
        self.failure: NrError | None = None

    def turned(self, status: Status) -> None:
        """The engine's status changed."""
        if status == "ready":
            self._was_ready = True
            self._say_ready()
        elif status == "failed" and not self._was_ready:
            self.failure = NrError(self._engine.failure or "the engine failed to start")
            self._server.should_exit = True
        elif status == "failed":
            # The process lives on, answering 503: what restarts it reads /health.
            print(f"error: the engine failed: {self._engine.failure}", file=sys.stderr, flush=True)

    def _say_ready(self) -> None:
        info, adapters = self._engine.info, self._engine.adapters
        with_adapters = f"adapters: {', '.join(adapters)}" if adapters else "no adapter loaded"
        print(
            f"ready: {info.model} on {self._address} ({info.device}, {info.dtype}; {with_adapters})",
            flush=True,
        )


def _engine(config: ServeConfig, model: str | Path, tokenizer: Tokenizer, deliver: Deliver) -> Engine:
    from nr_serve.engine.loop import EngineLoop

    return EngineLoop(config, model, tokenizer, deliver)


def _model_folder(model: str) -> str | Path:
    if model != "default":
        return model
    from nr_serve.default_model import fetch_model

    return fetch_model()


def _tokenizer(model: str | Path) -> Tokenizer:
    if str(model).startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise UnsupportedBase(f"there is no model folder {model}")
    try:
        return Tokenizer.load(model)
    except (OSError, ValueError) as error:
        raise UnsupportedBase(f"cannot load the tokenizer of {model}: {error}") from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _warn_if_open(config: ServeConfig) -> None:
    if config.api_key is None and config.admin_key is None and not is_loopback(config.host):
        print(
            f"warning: anyone who reaches {config.host} may use this server and change its adapters; "
            "set --api-key and --admin-key",
            file=sys.stderr,
        )


def _end(signum: int, frame: object) -> None:
    # uvicorn raises the signal again once it has shut down in order: that is a normal end.
    raise SystemExit(0)
