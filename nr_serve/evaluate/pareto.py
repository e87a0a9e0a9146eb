"""Learning against forgetting: ways of training as points, and those that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One training run: what it learned and what it forgot."""

    label: str
    forgotten: float
    """Relative rise of the loss on the base's own text."""
    learned: float
    """Relative fall of the loss on the target's text."""


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, sorted by `forgotten`: points that no other beats in both learned and forgotten."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.forgotten, -p.learned)):
        if not front or point.learned > front[-1].learned:
            front.append(point)
    return front
