"""Work off the event loop, on a thread at which callers take turns."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from nr_serve.api.request_state import CALLER
from nr_serve.errors import QueueFull

T = TypeVar("T")


class Worker:
    """A thread beside the event loop. Callers take turns, so that none can shut out the others."""

    def __init__(self, name: str, most: int) -> None:
        """Each caller may have up to `most` jobs waiting or running."""
        self._most = most
        self._asked: Counter[str] = Counter()
        self._busy = False
        self._turns: dict[str, deque[asyncio.Future[None]]] = {}  # the caller whose turn comes next is first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @asynccontextmanager
    async def turn(self, what: str) -> AsyncIterator[None]:
        """Wait for the caller's turn. Raises QueueFull, counting its `what`, if the caller has too many jobs."""
        caller = CALLER.get()
        if self._asked[caller] >= self._most:
            raise QueueFull(f"{self._asked[caller]} {what} already; try again later")
        self._asked[caller] += 1
        try:
            await self._wait(caller)
            try:
                yield
            finally:
                self._pass_on()
        finally:
            self._asked[caller] -= 1
            self._asked += Counter()  # drops callers with no job

    async def _wait(self, caller: str) -> None:
        if self._busy:
            turn = asyncio.get_running_loop().create_future()
            self._turns.setdefault(caller, deque()).append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # the turn came at the same moment
                    self._pass_on()
                raise
        self._busy = True

    def _pass_on(self) -> None:
        """Give the turn to the next caller; a caller with more jobs waiting goes to the end of the queue."""
        self._busy = False
        while self._turns and not self._busy:
            caller = next(iter(self._turns))
            waiting = self._turns.pop(caller)
            turn = waiting.popleft()
            if waiting:
                self._turns[caller] = waiting
            if not turn.done():
                turn.set_result(None)
                self._busy = True

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Run work; call it during a turn. If cancelled before it started, it does not run."""
        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    def stop(self) -> None:
        """Start no further work."""
        self._thread.shutdown(wait=False, cancel_futures=True)
