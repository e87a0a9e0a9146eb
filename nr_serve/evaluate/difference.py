"""The difference between two measurements of the same text, and how much of it may be noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Protocol


class Losses(Protocol):
    """Losses of one text, such as a `SourceResult` holds."""

    @property
    def loss(self) -> float:
        """Nats a token."""

    @property
    def nats_N(self) -> Sequence[float]:
        """Summed loss of each window, in nats."""

    @property
    def labels_N(self) -> Sequence[int]:
        """Tokens predicted in each window."""


@dataclass(frozen=True)
class Difference:
    """The loss of one source under one selection of adapters, less its loss under another."""

    nats: float
    """Nats a token; above 0 the text got harder."""
    nats_error: float | None
    """Standard error of `nats`, paired over windows; None for a single window."""
    share: float
    """`nats` as a share of the loss before."""
    standard_error: float | None
    """Standard error of `share`, likewise."""

    def __str__(self) -> str:
        return percent(self.share, self.standard_error, "+")


def error_of_mean(errors: Sequence[float | None]) -> float | None:
    """The standard error of the mean of values that are independent, from theirs; None if one has none."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None


def percent(share: float, error: float | None, sign: str = "") -> str:
    """`0.12% ± 0.05%` of a share and its standard error, if it has one; with `sign` "+" as `+0.12% ± 0.05%`."""
    return f"{share:{sign}.2%}" + ("" if error is None else f" ± {error:.2%}")


def difference(before: Losses, after: Losses) -> Difference:
    """How the loss changed between two measurements of the same windows.

    Both measurements read the same windows, so the windows' own difficulty cancels. Both figures are ratios of
    sums over windows, R = sum_i d_i / sum_i l_i, with d_i the change of window i in nats and l_i its predicted
    tokens; for the share, its nats before. Hence the standard error of a ratio, sqrt(n / (n - 1) sum_i (d_i - R
    l_i)^2) / sum_i l_i. Source: Cochran, "Sampling Techniques", 3rd edition, section 2.11. Windows are taken for
    independent; those of one document are not quite, so it is at the low end.
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
