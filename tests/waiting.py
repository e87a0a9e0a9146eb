"""Waiting for what another thread or process is about to do."""

import time
from collections.abc import Callable

PATIENCE = 300  # seconds until a test gives up on what should come at once; a busy machine compiles for 100


def until(done: Callable[[], bool], otherwise: str = "it never came") -> None:
    """Return once `done`; `otherwise` is the error's text if that takes too long."""
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, otherwise
        time.sleep(0.01)
