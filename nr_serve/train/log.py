"""A run's log, one JSON object per line, each with its `event`; and what is read from it afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from nr_serve.errors import BadRequest

Curve = list[tuple[int, float]]
"""(tokens, loss) pairs."""

_START = b'{"event"'


class Log:
    """Appends to a log. A line that a killed process left half-written is removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            with path.open("rb+") as log:
                log.truncate(log.read().rfind(b"\n") + 1)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


def is_log(path: Path) -> bool:
    """Whether a file starts like a log; a killed process may have left a part of its first line, or nothing."""
    with path.open("rb") as log:
        return _START.startswith(log.read(len(_START)))


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a log, in order, without a last line that is half-written.

    Raises BadRequest, with the line's number, for a file that cannot be read or is not a log.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {error.strerror}") from error
    return [_entry(path, number, line) for number, line in enumerate(lines, 1)]


def training_losses(path: Path) -> Curve:
    """The LM loss of a run's steps, from its `log.jsonl`; if a step was repeated, its last entry counts.

    Raises BadRequest for a file that is not a run's log.
    """
    return sorted({step.tokens: step.lm for step in _steps(path)}.items())


def training_seconds(path: Path, tokens: int) -> float:
    """Time of a run's steps up to `tokens`: tokens between two entries over their rate; repeated ones count once.

    Raises BadRequest for a file that is not a run's log.
    """
    total, before = 0.0, 0
    for step in _steps(path):
        upto = min(step.tokens, tokens)
        total += max(0, upto - before) / step.tokens_a_second
        before = max(before, upto)
    return total


class _Step(BaseModel):
    """What is read of a step's entry."""

    model_config = ConfigDict(strict=True)

    tokens: int
    lm: float
    tokens_a_second: float = Field(gt=0)


def _steps(path: Path) -> Iterator[_Step]:
    for number, entry in enumerate(read(path), start=1):
        if entry["event"] == "step":
            with _of_a_log(path, number):
                step = _Step.model_validate(entry)
            yield step


def _entry(path: Path, number: int, line: str) -> dict[str, Any]:
    with _of_a_log(path, number):
        entry: dict[str, Any] = json.loads(line)
        if not isinstance(entry, dict) or "event" not in entry:
            raise ValueError("no event")
        return entry


@contextmanager
def _of_a_log(path: Path, number: int) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{path} line {number}: not a line of a run's log") from error
