"""What every route needs, handed to it by FastAPI."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, TypeVar, cast

from fastapi import Depends, Request

from nr_serve.api.bridge import AsyncEngine
from nr_serve.api.middleware.auth import CALLER
from nr_serve.api.middleware.deadlines import Work
from nr_serve.config import ServeConfig
from nr_serve.errors import QueueFull
from nr_serve.tokenizer import Tokenizer

T = TypeVar("T")


class Worker:
    """A thread beside the event loop. Callers take turns at it, so that none shuts out another."""

    def __init__(self, name: str, most: int) -> None:
        """Of each caller, `most` may wait or be at work."""
        self._most = most
        self._asked: Counter[str] = Counter()
        self._busy = False
        self._turns: dict[str, deque[asyncio.Future[None]]] = {}  # the next caller first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @asynccontextmanager
    async def turn(self, what: str) -> AsyncIterator[None]:
        """Wait for the caller's turn. Raises QueueFull, which counts `what` waits, if the caller asks too much."""
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
            self._asked += Counter()  # forgets who asks nothing

    async def _wait(self, caller: str) -> None:
        if self._busy:
            turn = asyncio.get_running_loop().create_future()
            self._turns.setdefault(caller, deque()).append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # it came just now
                    self._pass_on()
                raise
        self._busy = True

    def _pass_on(self) -> None:
        """The next caller's turn; whoever has more waiting goes to the end."""
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
        """Run work, to be called in a turn; cancelled before it began, it is not run."""
        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    def stop(self) -> None:
        """Let no more work start."""
        self._thread.shutdown(wait=False, cancel_futures=True)


@dataclass
class Context:
    """The app's collaborators."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    config: ServeConfig
    started: int = field(default_factory=lambda: int(time.time()))
    """Unix time."""
    work: Work = field(default_factory=Work)
    texts: Worker = field(init=False)
    """Tokenises off the event loop, so that a long prompt does not hold up running streams."""
    grammars: Worker = field(init=False)
    """Compiles grammars, so that other prompts do not wait for one."""
    token_bytes: int = field(init=False)
    """No token stands for more bytes of text."""

    def __post_init__(self) -> None:
        # Vocabularies spell some bytes with two or three: this is an upper bound.
        self.token_bytes = max(len(token.encode()) for token in self.tokenizer.hf.get_vocab())
        # Of each caller, as much may wait for each as for the model.
        self.texts = Worker("nr-text", self.config.max_waiting)
        self.grammars = Worker("nr-guide", self.config.max_waiting)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.engine.status == "ready" and not self.work.draining

    async def text(self, work: Callable[[], T]) -> T:
        """Run tokenizer work on its thread. Raises QueueFull."""
        async with self.texts.turn("texts wait to be tokenised"):
            return await self.texts.run(work)

    def stop_threads(self) -> None:
        """Let no more work start."""
        self.texts.stop()
        self.grammars.stop()


def _context(request: Request) -> Context:
    return cast(Context, request.app.state.context)


Ctx = Annotated[Context, Depends(_context)]
