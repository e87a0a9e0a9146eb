"""The bank on a CPU: the same slots, with a step's layers in one compiled operator each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nr_serve.neutral.bank import Bank, parts
from nr_serve.neutral.format import Block
from nr_serve.neutral.pairs import BLOCK, VECTOR, write_pairs
from nr_serve.neutral.step import StepTokens, Trial


class Residues(Protocol):
    """The compiled operator, `engine/model/cpu/residues.h`. It reads and writes the bank's tensors in place."""

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
        """Start a step that evaluates the first `columns` slots; from token `first` on, `slot` is on trial."""

    def add(self, layer: int, x: Tensor, y: Tensor) -> None:
        """Add a layer's residues to y, in place; x and y [..., d], contiguous."""

    def end(self, label_T: Tensor, counted: int, end_E: Tensor | None, page_E: Tensor | None) -> Tensor | None:
        """End a step as `Bank.end` does, counting `counted` tokens. A step cut short changes nothing."""


class CpuBank(Bank):
    """A bank whose gates, carry and blocks take one call per layer."""

    _rows = VECTOR  # our own products compute whole vectors

    def __init__(self, residues: Callable[..., Residues], *, multiplies: bool, **shape: Any) -> None:
        """`residues` is `CpuOperators.residues`; `multiplies`: whether the operators have products of our own."""
        super().__init__(**shape)
        self._paired = multiplies and self.dtype is torch.bfloat16 and self.d % VECTOR == 0
        # Passed by name, because some tensors have the same shape.
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        self._residues = residues(tensors, self._paired)
        self._tokens: StepTokens | None = None  # of the current step

    def begin(self, tokens: StepTokens) -> None:
        """As `Bank.begin`."""
        if not self.attached:
            return
        trial = tokens.trial or Trial(len(tokens.row_T), 0, 0.0)  # a trial of no tokens
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

    def _write(self, block: Block, up_ud: Tensor, out_hd: Tensor) -> Iterator[None]:
        """As `Bank._write`, if need be in the layout of our own products.

        There W_in and W_gate come in turn, 16 rows of one and 16 of the other, so that each block of outputs gives
        hidden values. Missing rows are 0: their hidden values are too.
        """
        if not self._paired:
            yield from super()._write(block, up_ud, out_hd)
            return
        up, out = up_ud.flatten(), out_hd.flatten()
        for first, end in parts(block.h, self.d, VECTOR):
            if first:
                yield
            in_and_gate = [
                F.pad(weights[first:end].to(self.dtype), (0, 0, 0, (first - end) % VECTOR)).view(-1, VECTOR, self.d)
                for weights in (block.w_in, block.w_gate)
            ]
            rows = torch.stack(in_and_gate, 1).flatten(0, 2)
            write_pairs(up[2 * first * self.d :][: rows.numel()], rows, 2 * VECTOR)
        for first, end in parts(self.d, block.h, BLOCK):
            yield
            rows = F.pad(block.w_out[first:end].to(self.dtype), (0, -block.h % VECTOR))
            write_pairs(out[first * rows.shape[1] :][: rows.numel()], rows)

    @property
    def under_way(self) -> Residues | None:
        """The operator, in a step in which adapters may act; it can take the layers in place of `add_residues`."""
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
        """Number of slots to evaluate: 0 to the highest attached, rounded up to a multiple of eight.

        Rounding of a product changes with its width, and loading an adapter should not change the gates of others.
        A narrower product would not be faster.
        """
        return min(self.slots, (max(self.attached) + 8) // 8 * 8)
