"""The bank on a GPU: the same slots, with a step by Triton kernels; the host reads nothing before it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nr_serve.neutral import kernels
from nr_serve.neutral.bank import Bank
from nr_serve.neutral.step import StepTokens, Totals


class GpuBank(Bank):
    """A bank whose step can be captured in a CUDA graph.

    A step cut short leaves the carried states and the statistics of its first layers changed. A token's page may
    be -1: the token ends no page. A token with label `labels` does not count in the cross statistics. A trial must
    be a step of its own.
    """

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self._cross_KS = torch.zeros((self.labels + 1, self.slots), dtype=torch.int64, device=self.device)
        self._pieces: kernels.Pieces | None = None
        self._label_T = self._open_TS = torch.empty(0)
        self._trial: tuple[int, Tensor] | None = None  # the slot, and its usual threshold

    def begin(self, tokens: StepTokens, *, always: bool = False) -> None:
        """As `Bank.begin`; with `always` also while nothing is attached, to capture a graph beforehand."""
        if not (self.attached or always):
            return
        page_T = torch.full_like(tokens.row_T, -1)
        if tokens.end_E is not None and tokens.page_E is not None:
            page_T.index_copy_(0, tokens.end_E, tokens.page_E)
        first_P = tokens.last_P - tokens.offset_T[tokens.last_P]
        # The kernels need rows to be contiguous, and a step's selection may be stored by columns.
        selected_TS = tokens.selected_TS.contiguous()
        pieces = kernels.Pieces(first_P, tokens.last_P, tokens.row_T, selected_TS, page_T, tokens.longest)
        self._label_T, self._open_TS = tokens.label_T, torch.zeros_like(selected_TS, dtype=torch.int32)
        if tokens.trial is None:
            self._seen_LS += (self.width_LS > 0) * selected_TS.sum(0)
        else:
            assert tokens.trial.first == 0
            slot = tokens.trial.slot
            self._trial = slot, self.threshold_S[slot].clone()
            self.threshold_S[slot] = tokens.trial.threshold
        self._pieces = pieces  # last, when nothing can fail any more: marks the step as begun

    def add_residues(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """As `Bank.add_residues`; y is reused."""
        if self._pieces is None:
            return y
        x_Td, y_Td = x.reshape(-1, self.d), y.reshape(-1, self.d)
        width_S = self.width_LS[layer]
        g_TS = kernels.gates(x_Td, self._gate(layer), self._pieces, counts=self._trial is None)
        fired = kernels.compact(g_TS)
        u_STH = kernels.hidden(x_Td, g_TS, fired, self.w_up_SLud[:, layer], width_S)
        kernels.add(y_Td, u_STH, fired, self.w_out_SLhd[:, layer], width_S)
        return y_Td.view_as(y)

    def end(self) -> Tensor | None:
        """As `Bank.end`."""
        pieces, self._pieces = self._pieces, None
        if pieces is None:
            return None
        if self._trial is None:
            self._cross_KS.index_add_(0, self._label_T, self._open_TS.to(torch.int64))
        self._end_trial()
        return self._open_TS

    def drop(self) -> None:
        """As `Bank.drop`."""
        self._pieces = None
        self._end_trial()

    def _end_trial(self) -> None:
        if self._trial is not None:
            slot, threshold = self._trial
            self.threshold_S[slot] = threshold
            self._trial = None

    def read_totals(self) -> Totals:
        """As `Bank.read_totals`."""
        totals = super().read_totals()
        return replace(totals, cross_KS=totals.cross_KS[: self.labels])

    def _gate(self, layer: int) -> kernels.Gate:
        return kernels.Gate(
            w_Sd=self.gate_LSd[layer],
            b_S=self.bias_LS[layer],
            carry_S=self.carry_S,
            threshold_S=self.threshold_S,
            ceiling_S=self.ceiling_S,
            state_RS=self.state_LRS[layer],
            page_state_NS=self.page_state_LNS[layer],
            open_TS=self._open_TS,
            fired_S=self._fired_LS[layer],
            mass_S=self._mass_S,
        )
