"""What the bank is told of a step's tokens, and what it tells of them.

Shape suffixes as in `bank.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Trial:
    """A step's last tokens, on which a slot has another threshold, and which are not counted."""

    first: int
    """Index of the first of them."""
    slot: int
    threshold: float


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What the bank must know of a step's tokens. Integer tensors on the bank's device."""

    offset_T: Tensor
    """Place of a token in its piece; 0 starts one."""
    row_T: Tensor
    """State row of the token's request."""
    last_P: Tensor
    """Index of each piece's last token."""
    selected_TS: Tensor
    """Bool: may this slot act on this token."""
    label_T: Tensor
    """Which selection the token counts under in the cross statistics, below the bank's `labels`."""
    longest: int
    """Tokens of the longest piece; 1 in a step of decodes alone."""
    end_E: Tensor | None = None
    """Index of each token that ends a page whose state is to be kept; None: there is none."""
    page_E: Tensor | None = None
    """The pages those tokens end, below the bank's `pages`."""
    trial: Trial | None = None

    @property
    def counted(self) -> int:
        """Tokens that are counted: the first so many."""
        return len(self.row_T) if self.trial is None else self.trial.first


@dataclass(frozen=True, slots=True)
class Totals:
    """Gate statistics since they were last read."""

    fired_LS: list[list[int]]
    seen_LS: list[list[int]]
    mass_S: list[float]
    cross_KS: list[list[int]]
