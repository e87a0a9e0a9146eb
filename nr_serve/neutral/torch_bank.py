"""The bank where there is neither a compiler nor a GPU: the same slots, with a step as `math.py` defines it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nr_serve.neutral import math
from nr_serve.neutral.bank import Bank
from nr_serve.neutral.scan import segmented_carry
from nr_serve.neutral.step import StepTokens


class TorchBank(Bank):
    """A bank that evaluates the gates of all slots, and computes blocks for the tokens whose gate fired."""

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self._tokens: StepTokens | None = None  # of the current step
        self._m_L: list[Tensor] = []  # carried logits of the layers so far, [T, S] each

    def begin(self, tokens: StepTokens) -> None:
        """As `Bank.begin`."""
        if self.attached:
            self._tokens, self._m_L = tokens, []

    def add_residues(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """As `Bank.add_residues`; y is reused."""
        tokens = self._tokens
        if tokens is None:
            return y
        x_Td, y_Td = x.reshape(-1, self.d), y.reshape(-1, self.d)
        z_TS = math.gate_logit(x_Td, self.gate_LSd[layer].T, self.bias_LS[layer])
        state_PS = self.state_LRS[layer, tokens.row_T[tokens.last_P]]
        m_TS = segmented_carry(z_TS, self.carry_S, tokens.offset_T, state_PS)
        self._m_L.append(m_TS)
        g_TS = self._gates(m_TS, tokens)
        fired_TS = g_TS > 0  # False for NaN
        for slot in fired_TS.any(0).nonzero().flatten().tolist():
            token_f = fired_TS[:, slot].nonzero().flatten()
            y_Td.index_add_(0, token_f, self._residue(layer, slot, x_Td[token_f], g_TS[token_f, slot]))
        return y_Td.view_as(y)

    def end(self) -> Tensor | None:
        """As `Bank.end`."""
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            return None
        m_LTS = torch.stack(self._m_L)
        self.state_LRS[:, tokens.row_T[tokens.last_P]] = m_LTS[:, tokens.last_P]
        if tokens.end_E is not None and tokens.page_E is not None:
            self.page_state_LNS[:, tokens.page_E] = m_LTS[:, tokens.end_E]
        # Adapters that were not selected are observed, for the live interference matrix, but add nothing.
        open_TS = (m_LTS > self._thresholds(tokens)).sum(0, dtype=torch.int32)
        self._count(self._gates(m_LTS, tokens), open_TS, tokens)
        return open_TS if open_TS.any() else None

    def drop(self) -> None:
        """As `Bank.drop`."""
        self._tokens = None

    def _thresholds(self, tokens: StepTokens) -> Tensor:
        """Thresholds [S], or [T, S] with a trial."""
        trial = tokens.trial
        if trial is None:
            return self.threshold_S
        threshold_TS = self.threshold_S.repeat(len(tokens.row_T), 1)
        threshold_TS[trial.first :, trial.slot] = trial.threshold
        return threshold_TS

    def _gates(self, m: Tensor, tokens: StepTokens) -> Tensor:
        """Gates g of carried logits [..., T, S]; 0 where the slot is not selected."""
        g = math.block_gate(m, self._thresholds(tokens), self.ceiling_S)
        # `where`, not a product: the threshold of a detached slot is infinite and its weights may be anything.
        return torch.where(tokens.selected_TS, g, 0.0)

    def _residue(self, layer: int, slot: int, x_fd: Tensor, g_f: Tensor) -> Tensor:
        h = int(self.width_LS[layer, slot])
        w_in_hd, w_gate_hd = self.w_up_SLud[slot, layer, : 2 * h].chunk(2)
        return math.residue(x_fd, g_f, w_in_hd, w_gate_hd, self.w_out_SLhd[slot, layer, :h].T)

    def _count(self, g_LTS: Tensor, open_TS: Tensor, tokens: StepTokens) -> None:
        """Add a step's gates and open layers to the statistics."""
        counted = slice(tokens.counted)
        g_LTS = g_LTS[:, counted]
        self._seen_LS += (self.width_LS > 0) * tokens.selected_TS[counted].sum(0)
        self._fired_LS += (g_LTS > 0).sum(1)
        # A diverged stream or gate must not leave NaN or infinity in the totals for ever.
        self._mass_S += g_LTS.nan_to_num(posinf=0.0).sum((0, 1), dtype=torch.float64)
        self._cross_KS.index_add_(0, tokens.label_T[counted], open_TS[counted].long())
