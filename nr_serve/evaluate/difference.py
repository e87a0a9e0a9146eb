"""The difference between two measurements of the same text, and how much of it may be noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Protocol


class Losses(Protocol):
    """Losses of one text, as in a `SourceResult`."""

    @property
    def loss(self) -> float:
        """Mean loss, nats per token."""

    @property
    def nats_N(self) -> Sequence[float]:
        """Summed loss of each window, in nats."""

    @property
    def labels_N(self) -> Sequence[int]:
        """Number of tokens predicted in each window."""


@dataclass(frozen=True)
class Difference:
    """Change of one source's loss between two selections of adapters."""

    nats: float
    """Change in nats per token; above 0, the text became harder."""
    nats_error: float | None
    """Standard error of `nats`, paired over windows; None for a single window."""
    share: float
    """`nats` as a share of the earlier loss."""
    standard_error: float | None
    """Standard error of `share`, likewise."""

    def __str__(self) -> str:
        return percent(self.share, self.standard_error, "+")


def error_of_mean(errors: Sequence[float | None]) -> float | None:
    """Standard error of the mean of independent values, given their standard errors; None if one is unknown."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None


def percent(share: float, error: float | None, sign: str = "") -> str:
    """A share and its standard error, if known, such as `0.12% ± 0.05%`; with `sign` "+", `+0.12% ± 0.05%`."""
    return f"{share:{sign}.2%}" + ("" if error is None else f" ± {error:.2%}")


def difference(before: Losses, after: Losses) -> Difference:
    """How the loss changed between two measurements of the same windows.

    Both measurements read the same windows, so the windows' own difficulty cancels out. Both figures are ratios of
    sums over windows, R = sum_i d_i / sum_i l_i, where d_i is the change of window i in nats, and l_i its number of
    predicted tokens or, for the share, its nats before. So the standard error is that of a ratio:
    sqrt(n / (n - 1) sum_i (d_i - R l_i)^2) / sum_i l_i. Source: Cochran, "Sampling Techniques", 3rd edition,
    section 2.11. The formula assumes independent windows; windows of one document are not quite independent, so
    the error is somewhat underestimated.
    """
    d_N = [b - a for a, b in zip(before.nats_N, after.nats_N, strict=True)]
    return Difference(*_ratio(d_N, after.labels_N), *_ratio(d_N, before.nats_N))


def _ratio(above_N: Sequence[float], below_N: Sequence[float]) -> tuple[float, float | None]:
    """The ratio of two sums and its standard error; None for a single term."""
    n, below = len(below_N), sum(below_N)
    ratio = sum(above_N) / below
    if n == 1:
        return ratio, None
    squares = sum((a - ratio * b) ** 2 for a, b in zip(above_N, below_N, strict=True))
    return ratio, math.sqrt(n / (n - 1) * squares) / below


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent values and its standard error, s / sqrt(n); None for a single value."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return fmean(values), error
