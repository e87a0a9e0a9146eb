"""Tracks the requests under way, and ends them when the server shuts down."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager


class Underway:
    """The requests under way, and whether new ones are accepted."""

    def __init__(self) -> None:
        self.draining = False
        self._tasks: set[asyncio.Task[object]] = set()
        self._deadlines: set[asyncio.Timeout] = set()
        self._arriving: set[asyncio.Timeout] = set()

    @contextmanager
    def until(self, deadline: asyncio.Timeout) -> Iterator[None]:
        """Register the current task as handling a request, for the block, with this `deadline`."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._deadlines.add(deadline)
        try:
            yield
        finally:
            # Removed here, not when the task is done: a timeout cannot be rescheduled once its block was left.
            self._deadlines.discard(deadline)
            self._arriving.discard(deadline)

    def arriving(self, deadline: asyncio.Timeout) -> None:
        """Note that the request's body is still being received."""
        self._arriving.add(deadline)

    def arrived(self, deadline: asyncio.Timeout) -> None:
        """Note that the request's body has been received in full."""
        self._arriving.discard(deadline)

    @property
    def running(self) -> int:
        """Number of requests under way."""
        return len(self._deadlines)

    async def drain(self, grace_s: float) -> None:
        """Accept nothing new; return when all requests have ended, after `grace_s` seconds at the latest.

        A request whose body has not been received in full counts as new.
        """
        self.draining = True
        now = asyncio.get_running_loop().time()
        for deadline in self._deadlines:
            end = now if deadline in self._arriving else now + grace_s
            if not deadline.expired() and (deadline.when() or math.inf) > end:
                deadline.reschedule(end)
        if self._tasks:
            # A client that reads nothing may keep its connection open; its request is aborted all the same.
            await asyncio.wait(self._tasks, timeout=grace_s + 1)
