"""Learning against forgetting: ways of training as points, and those that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One training run: what it learned and what it forgot."""

    label: str
    forgotten: float
    """Rise of the loss on the base's own text, as a share of the loss or of what another run forgot."""
    learned: float
    """Fall of the loss on the target's text, as a share of the loss or of what another run learned."""


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, sorted by `forgotten`: points that no other beats in both learned and forgotten."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.forgotten, -p.learned)):
        if not front or point.learned > front[-1].learned:
            front.append(point)
    return front
