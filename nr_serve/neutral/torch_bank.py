"""The bank where there is neither a compiler nor a GPU: the same slots, with a step by torch's operators."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nr_serve.neutral.bank import Bank
from nr_serve.neutral.scan import StepCarries
from nr_serve.neutral.step import StepTokens


@dataclass(slots=True)
class _Step:
    """The step under way, and what its layers share. n: slots whose gates are evaluated."""

    tokens: StepTokens
    row_P: Tensor
    """State row of each piece's request."""
    selected_Tn: Tensor
    threshold: Tensor
    """[n], or [T, n] with a trial."""
    m_LTn: Tensor
    """Carried logits, filled layer by layer."""
    carries: StepCarries
    opened: bool = False


class TorchBank(Bank):
    """A bank that reads one value a layer, whether any gate fired, and computes no block if none did."""

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self._room = torch.empty(0)  # for the carried logits of a step, grown to the largest so far
        self._step: _Step | None = None

    def begin(self, tokens: StepTokens) -> None:
        """As `Bank.begin`."""
        if self.attached:
            self._step = self._prepared(tokens)

    def add_residues(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """As `Bank.add_residues`; y is reused."""
        step = self._step
        if step is None:
            return y
        x_Td = x.reshape(-1, self.d)
        over_Tn = self._gates(layer, x_Td, step)
        # The one value read of a layer. NaN, too, goes on to where every gate is looked at.
        if float(over_Tn.max()) <= 0:
            return y
        step.opened = True
        g_Tn = self._gate_values(over_Tn, step.selected_Tn)
        return self._add_blocks(layer, x_Td, y.reshape(-1, self.d), g_Tn).view_as(y)

    def end(self) -> Tensor | None:
        """As `Bank.end`."""
        step, self._step = self._step, None
        if step is None:
            return None
        self._keep(step)
        return self._count_open(step.tokens, step.m_LTn, step.threshold) if step.opened else None

    def drop(self) -> None:
        """As `Bank.drop`."""
        self._step = None

    def _prepared(self, tokens: StepTokens) -> _Step:
        """What the layers of a step share, made once."""
        n, T = self._columns, len(tokens.row_T)
        row_P = tokens.row_T if tokens.longest == 1 else tokens.row_T[tokens.last_P]
        if self.layers * T * n > len(self._room):
            self._room = torch.empty(self.layers * T * n, device=self.device)
        carries = StepCarries.of(
            self.carry_S[:n],
            float(self.carry_S[:n].max()),
            self._state_LRn.index_select(1, row_P),
            tokens.offset_T,
            tokens.last_P,
            tokens.longest,
        )
        m_LTn = self._room[: self.layers * T * n].view(self.layers, T, n)
        return _Step(tokens, row_P, tokens.selected_TS[:, :n], self._threshold(tokens), m_LTn, carries)

    def _threshold(self, tokens: StepTokens) -> Tensor:
        """Thresholds of the evaluated slots, [n], or [T, n] with a trial."""
        trial = tokens.trial
        if trial is None:
            return self._threshold_n
        threshold_Tn = self._threshold_n.repeat(len(tokens.row_T), 1)
        threshold_Tn[trial.first :, trial.slot] = trial.threshold
        return threshold_Tn

    def _gates(self, layer: int, x_Td: Tensor, step: _Step) -> Tensor:
        """Carried logit minus threshold of every token and evaluated slot, [T, n], selected or not."""
        z_Tn = F.linear(x_Td.float(), self._gate_L[layer], self._bias_L[layer])
        m_Tn = step.m_LTn[layer]
        step.carries.carry(layer, z_Tn, m_Tn)
        return m_Tn - step.threshold

    def _gate_values(self, over: Tensor, selected_Tn: Tensor) -> Tensor:
        """Gates g of carried logits minus threshold, [..., T, n], which are reused; 0 where not selected."""
        # where, not a product: the threshold of a detached slot is infinite and its weights may be anything.
        return torch.where(selected_Tn, torch.minimum(over.relu_(), self.ceiling_S[: self._columns]), 0.0)

    def _add_blocks(self, layer: int, x_Td: Tensor, y_Td: Tensor, g_Tn: Tensor) -> Tensor:
        """y plus g times the blocks, for the tokens whose g is above 0 and no others; y is reused."""
        slot_N, token_N = (g_Tn > 0).T.nonzero().unbind(1)
        counts = Counter(slot_N.tolist())  # in the order of the slots
        each = list(counts.values())
        for slot, token_f, g_f in zip(
            counts, token_N.split_with_sizes(each), g_Tn[token_N, slot_N].split_with_sizes(each), strict=True
        ):
            if len(token_f) == len(y_Td):
                y_Td.addmm_(*self._block(slot, layer, x_Td, g_f))
            else:
                hidden_fh, out_hd = self._block(slot, layer, x_Td.index_select(0, token_f), g_f)
                y_Td.index_add_(0, token_f, hidden_fh @ out_hd)
        return y_Td

    def _block(self, slot: int, layer: int, x_fd: Tensor, g_f: Tensor) -> tuple[Tensor, Tensor]:
        """A block's hidden values, scaled by g, and W_out: their product is the residue."""
        h = int(self.width_LS[layer, slot])
        in_fh, gate_fh = F.linear(x_fd, self.w_up_SLud[slot, layer, : 2 * h]).chunk(2, dim=1)
        hidden_fh = F.silu(gate_fh).mul_(in_fh).mul_(g_f[:, None].to(x_fd.dtype))
        return hidden_fh, self.w_out_SLhd[slot, layer, :h]

    def _keep(self, step: _Step) -> None:
        """Keep the carried logits of each piece's last token, and of those that end pages, and who was selected."""
        tokens, m_LTn = step.tokens, step.m_LTn
        last_LPn = m_LTn if tokens.longest == 1 else m_LTn.index_select(1, tokens.last_P)
        self._state_LRn.index_copy_(1, step.row_P, last_LPn)
        if tokens.end_E is not None and tokens.page_E is not None:
            self._page_state_LNn.index_copy_(1, tokens.page_E, m_LTn.index_select(1, tokens.end_E))
        self._seen_LS += (self.width_LS > 0) * tokens.selected_TS[: tokens.counted].sum(0)

    def _count_open(self, tokens: StepTokens, m_LTn: Tensor, threshold: Tensor) -> Tensor:
        """Layers open by token and slot, [T, S]; adds them, and what acted, to the statistics."""
        n, counted = self._columns, tokens.counted
        over_LTn = m_LTn - threshold
        # Adapters that were not selected are observed, for the live interference matrix, but add nothing.
        open_TS = F.pad((over_LTn > 0).sum(0, dtype=torch.int32), (0, self.slots - n))
        g_LTn = self._gate_values(over_LTn, tokens.selected_TS[:, :n])[:, :counted]
        self._fired_LS[:, :n] += (g_LTn > 0).sum(1)
        # A diverged stream or gate must not leave NaN or infinity in the totals for ever.
        self._mass_S[:n] += g_LTn.nan_to_num_(posinf=0.0).sum((0, 1), dtype=torch.float64)
        self._cross_KS.index_add_(0, tokens.label_T[:counted], open_TS[:counted].to(torch.int64))
        return open_TS

    def _look_at_attached(self) -> None:
        super()._look_at_attached()
        self._gate_L = self.gate_LSd[:, : self._columns].unbind()
        self._bias_L = self.bias_LS[:, : self._columns].unbind()
        self._threshold_n = self.threshold_S[: self._columns]
        self._state_LRn = self.state_LRS[:, :, : self._columns]
        self._page_state_LNn = self.page_state_LNS[:, :, : self._columns]
