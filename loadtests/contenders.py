"""The servers that are compared: started or found, made ready, paused while another one is measured."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

EXTRAS = {"ignore_eos": True, "stream_options": {"include_usage": True}}
"""Fields beyond those that every server takes."""
_NOT_YET = (404, 503)
_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass
class Contender:
    """A server to measure."""

    name: str
    source: str
    """Its URL, or the command that starts it."""
    url: str
    model: str = ""
    """What its requests name; `{language}` stands for the prompt's."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Further fields of its requests."""

    def body(self, text: str, language: str, tokens: int) -> dict[str, Any]:
        """A request, but for how its tokens are chosen."""
        model = self.model.format(language=language)
        fields = {"model": model, "prompt": text, "max_tokens": tokens, "stream": True}
        return fields | self.extras

    def processes(self) -> list[psutil.Process]:
        """The process that listens at its port, if that is on this machine, and its children."""
        address = urlsplit(self.url)
        if address.hostname not in _LOCAL:
            return []
        listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        pids = {c.pid for c in listening if c.pid and c.laddr.port == address.port}
        found = [psutil.Process(pid) for pid in pids]
        return list(dict.fromkeys(p for each in found for p in (each, *each.children(recursive=True))))

    def memory_mib(self) -> float | None:
        """Memory of its processes, shared pages counted once; None if they are not on this machine."""
        processes = self.processes()
        return sum(p.memory_full_info().pss for p in processes) / 2**20 if processes else None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let it run, and pause it after: an idle server may keep its threads spinning."""
        processes = self.processes()
        for process in processes:
            process.resume()
        try:
            yield
        finally:
            for process in processes:
                process.suspend()


@contextlib.contextmanager
def started(named: str, model: str | None, wait_seconds: float) -> Iterator[Contender]:
    """The contender of NAME=URL or NAME=COMMAND, ready and paused; what was started is ended.

    In the command `{port}` is a free port. Raises SystemExit if it does not get ready.
    """
    name, _, source = named.partition("=")
    if source.startswith(("http://", "https://")):
        process, url = None, source.rstrip("/")
    else:
        port = _free_port()
        process, url = _start(source.replace("{port}", str(port))), f"http://127.0.0.1:{port}"
    contender = Contender(name, source, url)
    try:
        _make_ready(contender, model, process, time.monotonic() + wait_seconds)
        for each in contender.processes():
            each.suspend()
        yield contender
    finally:
        for each in contender.processes():
            each.resume()
        if process is not None:
            _end(process)


def _start(command: str) -> subprocess.Popen[bytes]:
    # A session of its own: all that it starts ends with it.
    return subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.DEVNULL, start_new_session=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _make_ready(
    contender: Contender, model: str | None, process: subprocess.Popen[bytes] | None, until: float
) -> None:
    """Wait until it answers, and learn its model's name and whether it takes the further fields."""
    with httpx.Client(base_url=contender.url, timeout=300, trust_env=False) as http:
        while not _learn(contender, model, http):
            if process is not None and process.poll() is not None:
                raise SystemExit(f"{contender.name} ended with exit code {process.returncode}")
            if time.monotonic() > until:
                raise SystemExit(f"{contender.name} is not ready")
            time.sleep(0.5)


def _learn(contender: Contender, model: str | None, http: httpx.Client) -> bool:
    try:
        if model is None:
            listed = http.get("/v1/models")
            if listed.status_code in _NOT_YET:
                return False
            model = listed.raise_for_status().json()["data"][0]["id"]
        contender.model = model
        for extras in (EXTRAS, {}):
            contender.extras = extras
            answer = http.post("/v1/completions", json=contender.body("Once upon a time", "en", 2))
            if answer.status_code in _NOT_YET:
                return False
            if answer.is_success:
                return True
    except httpx.TransportError:
        return False
    raise SystemExit(f"{contender.name} refuses: {answer.text[:500]}")
