"""The objects that every route needs, injected by FastAPI."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Annotated, TypeVar, cast

from fastapi import Depends, Request

from nr_serve.api.bridge import AsyncEngine
from nr_serve.api.tool_support import tool_fault
from nr_serve.api.underway import Underway
from nr_serve.api.worker import Worker
from nr_serve.config import ServeConfig
from nr_serve.engine.guide import Guide
from nr_serve.engine.guide_check import GuideCheck
from nr_serve.tokenizer import Tokenizer

T = TypeVar("T")
_KEPT_GUIDES = 32


@dataclass
class Context:
    """The app's collaborators."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    config: ServeConfig
    started: int = field(default_factory=lambda: int(time.time()))
    """When the app was created, in Unix time."""
    underway: Underway = field(default_factory=Underway)
    texts: Worker = field(init=False)
    """Thread for tokenising, so that a long prompt does not hold up running streams."""
    grammars: Worker = field(init=False)
    """Compiles grammars, so that other prompts do not wait for one."""
    guide_check: GuideCheck = field(default_factory=GuideCheck)
    """Compiles them in another process first."""
    reports: Worker = field(init=False)
    """Writes large answers, so that running streams do not wait."""
    guides: Callable[[str], Guide] = field(init=False)
    """Compiles a grammar; the last ones are kept, some MB at most: clients often ask for the same one again."""
    most_token_bytes: int = field(init=False)
    """Upper bound of the bytes of text that one token stands for."""

    def __post_init__(self) -> None:
        # Vocabularies spell some bytes with two or three bytes, so this is an upper bound.
        self.most_token_bytes = max(len(token.encode()) for token in self.tokenizer.hf.get_vocab())
        self.guides = lru_cache(_KEPT_GUIDES)(self._guide)
        # Each caller may have as many jobs waiting for each thread as requests for the model.
        self.texts = Worker("nr-text", self.config.max_waiting)
        self.grammars = Worker("nr-guide", self.config.max_waiting)
        self.reports = Worker("nr-report", sys.maxsize)  # what was computed is not refused any more

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self.engine.status == "ready" and not self.underway.draining

    @cached_property
    def tool_fault(self) -> str | None:
        """Why requests with tools are refused; None if the base writes calls that can be read."""
        return tool_fault(self.tokenizer)

    def _guide(self, grammar: str) -> Guide:
        info = self.engine.info
        ours = self.tokenizer.for_grammars(info.vocab_size, info.eos_ids)
        self.guide_check.check(grammar, self.tokenizer.as_json, info.vocab_size, info.eos_ids)
        return Guide(grammar, ours)

    async def text(self, work: Callable[[], T]) -> T:
        """Run tokenizer work on its thread, in turn. Raises QueueFull."""
        async with self.texts.turn("texts wait to be tokenised"):
            return await self.texts.run(work)

    async def report(self, work: Callable[[], T]) -> T:
        """Run the writing of a large answer on its thread."""
        async with self.reports.turn("large answers wait to be written"):
            return await self.reports.run(work)

    def stop_threads(self) -> None:
        """Start no further work on the threads."""
        self.texts.stop()
        self.grammars.stop()
        self.guide_check.stop()
        self.reports.stop()


def _context(request: Request) -> Context:
    return cast(Context, request.app.state.context)


Ctx = Annotated[Context, Depends(_context)]
