"""A step's tokens as the bank needs them, and the statistics that it returns.

Shape suffixes as in `bank.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Trial:
    """The last tokens of a step, on which one slot has another threshold, and which are not counted."""

    first: int
    """Index of the first token on trial."""
    slot: int
    threshold: float


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What the bank must know about a step's tokens. Integer tensors on the bank's device."""

    offset_T: Tensor
    """Offset of each token in its piece; 0 starts a piece."""
    row_T: Tensor
    """State row of the token's request."""
    last_P: Tensor
    """Index of each piece's last token."""
    selected_TS: Tensor
    """Bool: whether the slot may act on the token."""
    label_T: Tensor
    """Row of the cross statistics that the token counts in, below the bank's `labels`."""
    longest: int
    """Number of tokens in the longest piece; 1 if all pieces are decodes."""
    end_E: Tensor | None = None
    """Index of each token that ends a page whose carried state must be kept; None if there is none."""
    page_E: Tensor | None = None
    """The page that each of these tokens ends, below the bank's `pages`; for the GPU's bank -1 if it ends none."""
    trial: Trial | None = None

    @property
    def counted(self) -> int:
        """Number of tokens that count in the statistics: those before the trial."""
        return len(self.row_T) if self.trial is None else self.trial.first


@dataclass(frozen=True, slots=True)
class Totals:
    """Gate statistics since the last read."""

    fired_LS: list[list[int]]
    seen_LS: list[list[int]]
    mass_S: list[float]
    cross_KS: list[list[int]]
