"""Servers as `nr-serve serve` runs them, in a thread or in a process of their own."""

import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial

import httpx

from nr_serve.api.app import create_app
from nr_serve.api.bridge import AsyncEngine
from nr_serve.config import ServeConfig
from nr_serve.engine.loop import EngineLoop
from nr_serve.metrics import Metrics
from nr_serve.serve import HttpServer, bind
from tests import tiny
from tests.fakes import Served, in_thread
from tests.waiting import PATIENCE, until


@contextmanager
def running(build, tokenizer, **config):
    """A server in a thread: what serves, and the server to send signals to."""
    engines = []

    def remember(deliver):
        engines.append(build(deliver))
        return engines[0]

    settings = ServeConfig(**config)
    app = create_app(AsyncEngine(remember, Metrics()), tokenizer, settings)
    server = HttpServer(app, app.state.context.underway, settings.grace_period)
    with in_thread(server) as url:
        served = Served(engines[0], url)
        try:
            until(lambda: served.http.get("/ready").status_code == 200)
            yield served, server
        finally:
            served.http.close()


@contextmanager
def process(*flags: str, until_it_is: str = "ready"):
    """A server over the engine of `halting.py` in a process, in this status; and a client of it."""
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    client = Served(None, f"http://127.0.0.1:{port}")
    command = [sys.executable, "-m", "tests.unit.halting", "--port", str(port), *flags]
    # A shell's background jobs ignore SIGINT, and so would what they start.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=heeds, **pipes) as server:
        try:
            until(lambda: server.poll() is not None or _status(client) == until_it_is)
            assert server.poll() is None, server.stderr.read()
            yield server, client
        finally:
            client.http.close()
            server.kill()


def _status(client: Served) -> str | None:
    try:
        return client.http.get("/health").json()["status"]
    except httpx.ConnectError:
        return None


class Loop(EngineLoop):
    """The real engine; `core` is what it runs."""

    def __init__(self, folder, deliver) -> None:
        settings = {"pages": 64, "page_size": 4, "slots": 2, "slot_width": 16, "max_running": 2, "device": "cpu"}
        super().__init__(ServeConfig(**settings), folder, tiny.tokenizer(), deliver)

    def _serve(self, core, adapters):
        self.core = core
        super()._serve(core, adapters)

    def hold(self, step: int, then=None) -> threading.Event:
        """Stand before that step, counted from now, until the event is set; `then` may take the step's place.

        `standing` is set once it stands.
        """
        real, steps, go_on = self.core.launch, [], threading.Event()
        self.standing = threading.Event()

        def held(**how):
            steps.append(1)
            if len(steps) >= step:
                self.standing.set()
                assert go_on.wait(PATIENCE)
            return real(**how) if len(steps) < step or then is None else then()

        self.core.launch = held
        return go_on
