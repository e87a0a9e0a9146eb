"""What a run's log tells afterwards: the losses and the time of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nr_serve.errors import BadRequest
from nr_serve.train import log

Curve = list[tuple[int, float]]
"""(tokens, loss) pairs."""


def training_losses(path: Path) -> Curve:
    """The LM loss of a run's steps as its `log.jsonl` has them; of a step that was repeated the later line counts.

    Raises BadRequest for a file that is not such a log.
    """
    curve: dict[int, float] = {}
    for number, entry in enumerate(log.read(path), start=1):
        with _of_a_log(path, number):
            if entry["event"] == "step":
                curve[entry["tokens"]] = entry["lm"]
    return sorted(curve.items())


def training_seconds(path: Path) -> float:
    """Time of a run's steps: the tokens between two lines over their rate; repeated steps count once.

    Raises BadRequest for a file that is not a run's log.
    """
    total, before = 0.0, 0
    for number, entry in enumerate(log.read(path), start=1):
        with _of_a_log(path, number):
            if entry["event"] == "step":
                total += max(0, entry["tokens"] - before) / entry["tokens_a_second"]
                before = max(before, entry["tokens"])
    return total


@contextmanager
def _of_a_log(path: Path, number: int) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise BadRequest(f"{path} line {number}: not a line of a run's log") from error
