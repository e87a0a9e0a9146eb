"""The bank on a CPU: the same slots, with a step's layers in one compiled operator each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from nr_serve.neutral.bank import Bank
from nr_serve.neutral.step import StepTokens, Trial


class Residues(Protocol):
    """The operator, in `engine/model/cpu/residues.h`. It reads and writes the bank's tensors in their place."""

    def begin(
        self,
        row_T: Tensor,
        offset_T: Tensor,
        selected_TS: Tensor,
        columns: int,
        first: int,
        slot: int,
        threshold: float,
    ) -> None:
        """Start a step that evaluates the first `columns` slots; from token `first` on a slot is on trial."""

    def add(self, layer: int, x: Tensor, y: Tensor) -> None:
        """Add a layer's residues to y, in place; x and y [..., d], contiguous."""

    def end(self, label_T: Tensor, counted: int, end_E: Tensor | None, page_E: Tensor | None) -> Tensor | None:
        """End a step: states are kept, the first tokens counted, but of a step cut short nothing. As `Bank.end`."""


class CpuBank(Bank):
    """A bank whose gates, carry and blocks cost a call a layer."""

    def __init__(self, residues: Callable[..., Residues], **shape: Any) -> None:
        """`residues` is that of `cpu_operators`."""
        super().__init__(**shape)
        # By name: some have one shape.
        self._residues = residues({name: value for name, value in vars(self).items() if isinstance(value, Tensor)})
        self._tokens: StepTokens | None = None  # of the step under way

    def begin(self, tokens: StepTokens) -> None:
        """As `Bank.begin`."""
        if not self.attached:
            return
        trial = tokens.trial or Trial(len(tokens.row_T), 0, 0.0)  # of none of them
        self._residues.begin(
            tokens.row_T,
            tokens.offset_T,
            tokens.selected_TS,
            self._columns(),
            trial.first,
            trial.slot,
            trial.threshold,
        )
        self._tokens = tokens

    @property
    def under_way(self) -> Residues | None:
        """The operator, in a step in which adapters may act: who calls its `add` need not call `add_residues`."""
        return None if self._tokens is None else self._residues

    def add_residues(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """As `Bank.add_residues`; y is reused."""
        if self._tokens is None:
            return y
        y = y.contiguous()
        self._residues.add(layer, x.contiguous(), y)
        return y

    def end(self) -> Tensor | None:
        """As `Bank.end`."""
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            return None
        return self._residues.end(tokens.label_T, tokens.counted, tokens.end_E, tokens.page_E)

    def drop(self) -> None:
        """As `Bank.drop`."""
        self._tokens = None

    def _columns(self) -> int:
        """Gates are evaluated in slots 0 to the highest attached, rounded up to a multiple of eight.

        A product's rounding changes with its width, and a load should not move the gates of others; nor is a
        narrower product faster.
        """
        return min(self.slots, (max(self.attached) + 8) // 8 * 8)
