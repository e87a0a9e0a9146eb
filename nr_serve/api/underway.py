"""The requests under way, and how they end soon once the server is told to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager


class Underway:
    """What is under way, and whether more is taken."""

    def __init__(self) -> None:
        self.draining = False
        self._tasks: set[asyncio.Task[object]] = set()
        self._deadlines: set[asyncio.Timeout] = set()
        self._arriving: set[asyncio.Timeout] = set()

    @contextmanager
    def until(self, deadline: asyncio.Timeout) -> Iterator[None]:
        """The current task works on a request, in this block until `deadline`."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._deadlines.add(deadline)
        try:
            yield
        finally:
            # At once, and not when the task is done: a timeout that was left cannot be set any more.
            self._deadlines.discard(deadline)
            self._arriving.discard(deadline)

    def arriving(self, deadline: asyncio.Timeout) -> None:
        """The request's body is still on its way."""
        self._arriving.add(deadline)

    def arrived(self, deadline: asyncio.Timeout) -> None:
        """All of it is here."""
        self._arriving.discard(deadline)

    @property
    def running(self) -> int:
        """Requests under way."""
        return len(self._deadlines)

    async def drain(self, grace_s: float) -> None:
        """Take nothing new; return when all has ended, which is after `grace_s` seconds at the latest.

        What has not arrived in full is new.
        """
        self.draining = True
        now = asyncio.get_running_loop().time()
        for deadline in self._deadlines:
            end = now if deadline in self._arriving else now + grace_s
            if not deadline.expired() and (deadline.when() or math.inf) > end:
                deadline.reschedule(end)
        if self._tasks:
            # A client that reads nothing may keep its connection; its request is aborted all the same.
            await asyncio.wait(self._tasks, timeout=grace_s + 1)
