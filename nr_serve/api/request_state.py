"""State of the request that the current task handles: the middleware creates it, inner layers add to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from nr_serve.engine.messages import Output, Submit


@dataclass
class Entry:
    """What the access log says about one request."""

    status: int | None = None
    submits: Sequence[Submit] = ()
    completion_tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    arrived: float | None = None
    """When its body was whole; None for a request without one."""

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Token ids of each prompt, once per prompt, however many answers it gets."""
        return list({id(submit.prompt_ids): submit.prompt_ids for submit in self.submits}.values())

    def fields(self) -> dict[str, Any]:
        """The entry's fields for the log line."""
        fields: dict[str, Any] = {"status": self.status, "seconds": round(time.monotonic() - self.started, 4)}
        if self.submits:
            fields["selection"] = self.submits[0].selected
            fields["prompt_tokens"] = sum(map(len, self.prompts))
            fields["completion_tokens"] = self.completion_tokens
        return fields


ENTRY: ContextVar[Entry | None] = ContextVar("entry", default=None)
"""Log entry of the request that this task handles."""
CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Who sent the request: the name of a key, or an address."""


def note_arrival() -> None:
    """Record that the body of the current request is whole."""
    entry = ENTRY.get()
    if entry is not None:
        entry.arrived = time.monotonic()


def arrival() -> float:
    """When the current request arrived, by `time.monotonic()`; now, if it has no body or there is no request."""
    entry = ENTRY.get()
    return time.monotonic() if entry is None or entry.arrived is None else entry.arrived


def note_submits(submits: Sequence[Submit]) -> None:
    """Record what the current request asks of the engine."""
    entry = ENTRY.get()
    if entry is not None:
        entry.submits = submits


def note_output(output: Output) -> None:
    """Record an output that the engine gave the current request."""
    entry = ENTRY.get()
    if entry is not None:
        entry.completion_tokens += len(output.tokens)
