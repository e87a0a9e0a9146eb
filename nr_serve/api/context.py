"""What every route needs, handed to it by FastAPI."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, TypeVar, cast

from fastapi import Depends, Request

from nr_serve.api.bridge import AsyncEngine
from nr_serve.api.work import Work
from nr_serve.config import ServeConfig
from nr_serve.errors import QueueFull
from nr_serve.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass
class Context:
    """The app's collaborators."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    config: ServeConfig
    started: int = field(default_factory=lambda: int(time.time()))
    """Unix time."""
    text_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="nr-text")
    )
    """Tokenises off the event loop, so that a long prompt does not hold up running streams."""
    guide_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="nr-guide")
    )
    """Compiles grammars, so that other prompts do not wait for one."""
    work: Work = field(default_factory=Work)
    token_bytes: int = field(init=False)
    """No token stands for more bytes of text."""

    def __post_init__(self) -> None:
        # Vocabularies spell some bytes with two or three: this is an upper bound.
        self.token_bytes = max(len(token.encode()) for token in self.tokenizer.hf.get_vocab())
        self._texts = 0

    async def text(self, work: Callable[[], T]) -> T:
        """Run tokenizer work on its thread. Raises QueueFull if as much waits there as may wait for the model."""
        if self._texts >= self.config.max_waiting:
            raise QueueFull(f"{self._texts} texts wait to be tokenised already; try again later")
        self._texts += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.text_thread, work)
        finally:
            self._texts -= 1

    def stop_threads(self) -> None:
        """Let no more work start."""
        for thread in (self.text_thread, self.guide_thread):
            thread.shutdown(wait=False, cancel_futures=True)


def _context(request: Request) -> Context:
    return cast(Context, request.app.state.context)


Ctx = Annotated[Context, Depends(_context)]
