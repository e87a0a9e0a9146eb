"""What every route needs, handed to it by FastAPI."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar, cast

from fastapi import Depends, Request

from nr_serve.api.bridge import AsyncEngine
from nr_serve.api.underway import Underway
from nr_serve.api.worker import Worker
from nr_serve.config import ServeConfig
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
    underway: Underway = field(default_factory=Underway)
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
        return self.engine.status == "ready" and not self.underway.draining

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
