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
    share: float
    """`nats` as a share of the loss before."""
    standard_error: float | None
    """Standard error of `share`, paired over windows; None for a single window."""

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

    Both measurements read the same windows, so the windows' own difficulty cancels. The loss is a ratio, nats over
    predicted tokens, and windows may predict unequal numbers of tokens, hence the standard error of a ratio:
    sqrt(n / (n - 1) sum_i (d_i - D l_i)^2) / sum_i l_i, with d_i the change of window i in nats, l_i its predicted
    tokens and D = sum d / sum l. Source: Cochran, "Sampling Techniques", 3rd edition, section 2.11. Windows are
    taken for independent; those that follow each other in one document are not quite, so it is at the low end.
    """
    d_N = [b - a for a, b in zip(before.nats_N, after.nats_N, strict=True)]
    n, labels = len(d_N), sum(after.labels_N)
    nats = sum(d_N) / labels
    error = None
    if n > 1:
        squares = sum((d - nats * count) ** 2 for d, count in zip(d_N, after.labels_N, strict=True))
        error = math.sqrt(n / (n - 1) * squares) / labels / before.loss
    return Difference(nats, nats / before.loss, error)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent values and its standard error, s / sqrt(n); None for a single value."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return fmean(values), error
