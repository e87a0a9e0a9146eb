"""The bank: slots of adapter weights in device memory, and the residues of one step.

Owns the stacked weights, the carried gate state of each request (by row), and the gate statistics. It takes
flattened hidden states and a per-token selection; it knows no request, no page and no HTTP, so that another
engine can host it.

Shape suffixes: T tokens of a step, P pieces (runs of tokens of one request), S slots, R rows, L layers,
K labels, d width of the stream, h width of a slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nr_serve.errors import BadAdapterFile
from nr_serve.neutral import math
from nr_serve.neutral.format import Adapter
from nr_serve.neutral.scan import segmented_carry

_SHUT = -1e30  # bias of a layer without a block: finite, so that the carry of it stays finite


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


@dataclass(frozen=True, slots=True)
class Totals:
    """Gate statistics since they were last read."""

    fired_LS: list[list[int]]
    seen_LS: list[list[int]]
    mass_S: list[float]
    cross_KS: list[list[int]]


class Bank:
    """Slots allocated once; adapters come and go in place, so device pointers stay valid."""

    def __init__(
        self,
        *,
        layers: int,
        d: int,
        slots: int,
        width: int,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
        labels: int = 64,
    ) -> None:
        self.layers, self.d, self.slots, self.width, self.rows = layers, d, slots, width, rows
        self.device, self.dtype = device, dtype
        self.labels = labels

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.gate_LdS = zeros(layers, d, slots)
        self.bias_LS = zeros(layers, slots)
        self.carry_S = zeros(slots)
        self.threshold_S = torch.full((slots,), torch.inf, device=device)  # inf: detached, can never fire
        self.w_in_SLhd = zeros(slots, layers, width, d, dtype=dtype)
        self.w_gate_SLhd = zeros(slots, layers, width, d, dtype=dtype)
        self.w_out_SLhd = zeros(slots, layers, width, d, dtype=dtype)  # transposed, as rows of h are filled
        self.widths: list[list[int]] = [[0] * layers for _ in range(slots)]
        self.attached: set[int] = set()
        # NaN: nothing carried yet. A row belongs to one running request.
        self.state_LRS = torch.full((layers, rows, slots), torch.nan, device=device)

        self._fired_LS = zeros(layers, slots, dtype=torch.int64)
        self._seen_LS = zeros(layers, slots, dtype=torch.int64)
        self._mass_S = zeros(slots, dtype=torch.float64)
        self._cross_KS = zeros(labels, slots, dtype=torch.int64)
        self._has_block_LS = zeros(layers, slots, dtype=torch.int64)
        self._step: StepTokens | None = None
        self._open_TS: Tensor | None = None
        self._counts = True

    # Slots

    def check_fits(self, adapter: Adapter) -> None:
        """Raise BadAdapterFile if the adapter's blocks are wider than a slot."""
        if adapter.h > self.width:
            raise BadAdapterFile(
                f"its blocks are {adapter.h} wide, a slot holds {self.width}; "
                f"restart the server with --slot-width {adapter.h}"
            )

    def attach(self, slot: int, adapter: Adapter, threshold: float) -> Iterator[None]:
        """Copy an adapter into a slot, a layer between yields; it can fire once the iterator is exhausted.

        Steps may run between yields: until the end the slot's threshold is infinite. With an infinite `threshold`
        the slot is filled and stays shut, until `set_threshold`.
        """
        self.check_fits(adapter)
        self.detach(slot)
        for layer, block in enumerate(adapter.blocks):
            if block is None:
                self.gate_LdS[layer, :, slot] = 0
                self.bias_LS[layer, slot] = _SHUT
                self.widths[slot][layer] = 0
            else:
                h = block.h
                self.gate_LdS[layer, :, slot].copy_(block.gate)
                self.bias_LS[layer, slot].copy_(block.bias)
                self.w_in_SLhd[slot, layer, :h].copy_(block.w_in)
                self.w_gate_SLhd[slot, layer, :h].copy_(block.w_gate)
                self.w_out_SLhd[slot, layer, :h].copy_(block.w_out.T)
                self.widths[slot][layer] = h
            self._has_block_LS[layer, slot] = int(block is not None)
            yield
        self.carry_S[slot] = adapter.info.carry
        self.state_LRS[:, :, slot] = torch.nan
        self.threshold_S[slot] = threshold
        self.attached.add(slot)

    def detach(self, slot: int) -> None:
        """Shut a slot at once; its memory is reused by the next attach."""
        self.threshold_S[slot] = torch.inf
        self.attached.discard(slot)

    def set_threshold(self, slot: int, threshold: float) -> None:
        """Turn an attached adapter's dial; takes effect with the next step."""
        self.threshold_S[slot] = threshold

    def forget_row(self, row: int) -> None:
        """Clear a row's carried state: its next token starts a sequence."""
        self.state_LRS[:, row] = torch.nan

    @contextmanager
    def trial(self, slot: int, threshold: float) -> Iterator[None]:
        """Steps within it use this threshold in the slot and are not counted; afterwards all is as it was."""
        before = self.threshold_S[slot].clone()
        self.threshold_S[slot], self._counts = threshold, False
        try:
            yield
        finally:
            self.threshold_S[slot], self._counts = before, True

    # Steps

    def begin(self, tokens: StepTokens) -> None:
        """Start a step; `add_residues` follows once for every layer, in order."""
        if not self.attached:
            return
        self._step = tokens
        self._open_TS = torch.zeros_like(tokens.selected_TS, dtype=torch.int32)
        if self._counts:
            self._seen_LS += self._has_block_LS * tokens.selected_TS.sum(0)

    def add_residues(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """y plus the residues of the selected adapters whose gate fired; x and y are [..., d], y may be reused.

        Where no gate fired y is returned as it came, to the bit.
        """
        if self._step is None:
            return y
        x_Td, y_Td = x.reshape(-1, self.d), y.reshape(-1, self.d)
        g_TS = self._gates(layer, x_Td, self._step)
        for slot in torch.nonzero((g_TS > 0).any(0)).flatten().tolist():
            fired_n = torch.nonzero(g_TS[:, slot] > 0).flatten()
            h = self.widths[slot][layer]
            residue_nd = math.residue(
                x_Td[fired_n],
                g_TS[fired_n, slot],
                self.w_in_SLhd[slot, layer, :h],
                self.w_gate_SLhd[slot, layer, :h],
                self.w_out_SLhd[slot, layer, :h].T,
            )
            y_Td = y_Td.index_add_(0, fired_n, residue_nd)
        return y_Td.view_as(y)

    def end(self) -> Tensor | None:
        """Finish the step. Layers fired by token and slot, int32 [T, S], or None when nothing is attached."""
        step, open_TS = self._step, self._open_TS
        self._step = self._open_TS = None
        if step is None or open_TS is None:
            return None
        if self._counts:
            self._cross_KS.index_add_(0, step.label_T, open_TS.to(torch.int64))
        return open_TS * step.selected_TS

    def read_totals(self) -> Totals:
        """Read the statistics and set them to zero."""
        counters = (self._fired_LS, self._seen_LS, self._mass_S, self._cross_KS)
        fired, seen, mass, cross = (counter.tolist() for counter in counters)
        for counter in counters:
            counter.zero_()
        return Totals(fired, seen, mass, cross)

    def _gates(self, layer: int, x_Td: Tensor, step: StepTokens) -> Tensor:
        """Block gates of every slot, 0 where not selected, [T, S]; moves the carried state on."""
        assert self._open_TS is not None
        z_TS = torch.addmm(self.bias_LS[layer], x_Td.float(), self.gate_LdS[layer])
        m_TS = segmented_carry(z_TS, self.carry_S, step.offset_T, self.state_LRS[layer, step.row_T])
        self.state_LRS[layer, step.row_T[step.last_P]] = m_TS[step.last_P]
        # Adapters that were not selected are observed, for the live interference matrix, but add nothing.
        self._open_TS += m_TS > self.threshold_S
        # where, not a product: the threshold of a detached slot is infinite and its weights may be anything.
        g_TS = torch.where(step.selected_TS, math.block_gate(m_TS, self.threshold_S), 0.0)
        if self._counts:
            self._fired_LS[layer] += (g_TS > 0).sum(0)
            # A stream or a gate gone wild must not leave NaN or infinity in the totals for ever.
            self._mass_S += g_TS.double().nan_to_num(posinf=0.0).sum(0)
        return g_TS
