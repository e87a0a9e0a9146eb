"""What is known of the request at work in this task: the middleware writes it, what lies within it adds to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from nr_serve.engine.messages import Output, Submit


@dataclass
class Entry:
    """What the log says of one request."""

    status: int | None = None
    submits: Sequence[Submit] = ()
    completion_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Each prompt once, however many answers it gets."""
        return list({id(submit.prompt_ids): submit.prompt_ids for submit in self.submits}.values())

    def fields(self) -> dict[str, Any]:
        """Its numbers."""
        fields: dict[str, Any] = {"status": self.status, "seconds": round(time.perf_counter() - self.started, 4)}
        if self.submits:
            fields["selection"] = self.submits[0].selected
            fields["prompt_tokens"] = sum(map(len, self.prompts))
            fields["completion_tokens"] = self.completion_tokens
        return fields


ENTRY: ContextVar[Entry | None] = ContextVar("entry", default=None)
"""Of the request at work here."""
CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Who sent it: the name of a key, or an address."""


def note_submits(submits: Sequence[Submit]) -> None:
    """The request at work here asks this of the engine."""
    entry = ENTRY.get()
    if entry is not None:
        entry.submits = submits


def note_output(output: Output) -> None:
    """The engine gave the request at work here an output."""
    entry = ENTRY.get()
    if entry is not None:
        entry.completion_tokens += len(output.tokens)
