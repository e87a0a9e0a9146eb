"""Learning against forgetting: ways of training as points, and those that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One way of training: what it learned and what it forgot."""

    label: str
    forgotten: float
    """Rise of the loss on the base's own text, as a share."""
    learned: float
    """Fall of the loss on the text learned, as a share."""


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, by what was forgotten: those of which no other learned more and forgot no more."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.forgotten, -p.learned)):
        if not front or point.learned > front[-1].learned:
            front.append(point)
    return front
