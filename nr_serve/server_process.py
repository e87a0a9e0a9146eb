"""A server in a process of its own, for demos and tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nr_serve.client import Client
from nr_serve.errors import NrError

_END_SECONDS = 60.0


@contextmanager
def local_server(*flags: str) -> Iterator[Client]:
    """Run `nr-serve serve` with `flags` on a free port for the block; yields a client once the server is ready.

    Of the environment's NR_* variables, only NR_CACHE is passed on. Raises Unavailable if the server ends before
    it is ready, and NrError if its exit code is not 0.
    """
    port = _free_port()
    command = [sys.executable, "-m", "nr_serve.cli", "serve", "--port", str(port), *flags]
    plain = {k: v for k, v in os.environ.items() if k == "NR_CACHE" or not k.startswith("NR_")}
    process = subprocess.Popen(command, env=plain)
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            client.wait_ready(alive=lambda: process.poll() is None)
            yield client
    finally:
        code = _end(process)
    if code != 0:
        raise NrError(f"the server ended with exit code {code}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _end(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
