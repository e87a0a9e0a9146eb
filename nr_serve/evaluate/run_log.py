"""What a run's log tells afterwards: its loss curves, and the time of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nr_serve.errors import BadRequest
from nr_serve.train import log

Curve = list[tuple[int, float]]
"""(tokens, loss) pairs."""


def read_losses(path: Path) -> dict[str, Curve]:
    """The loss curves in a run's `log.jsonl`: `train`, and each held-out source.

    A resumed run repeats steps; the later line counts. A held-out measurement without a step belongs to the step
    logged before it. Raises BadRequest for a file that is not such a log.
    """
    curves: dict[str, dict[int, float]] = {"train": {}}
    step, tokens_a_step = 0, 0
    for number, entry in enumerate(log.read(path), start=1):
        with _of_a_log(path, number):
            step = entry.get("step", step)
            if entry["event"] == "step":
                tokens_a_step = entry["tokens"] // step
                curves["train"][step] = entry["lm"]
            elif entry["event"] == "heldout":
                for source, measured in entry["sources"].items():
                    curves.setdefault(source, {})[step] = measured["after"]
    return {
        name: [(at * tokens_a_step, loss) for at, loss in sorted(curve.items())]
        for name, curve in curves.items()
        if curve
    }


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
