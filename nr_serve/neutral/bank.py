"""The bank: slots of adapter weights in device memory, and the residues of one step.

Owns the stacked weights, the carried gate state of each request (by row) and at the end of each KV page, and the
gate statistics. It takes flattened hidden states and a per-token selection; it knows no request, no page and no
HTTP, so that another engine can host it.

Shape suffixes: T tokens of a step, P pieces (runs of tokens of one request), E ends of pages in a step, S slots,
R rows, N pages, L layers, K labels, d width of the stream, h width of a slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nr_serve.errors import BadAdapterFile
from nr_serve.names import MOST_JOINED
from nr_serve.neutral.format import Adapter
from nr_serve.neutral.scan import StepCarries
from nr_serve.neutral.step import StepTokens, Totals

_SHUT = -1e30  # bias of a layer without a block: finite, so that the carry of it stays finite


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
    layers_done: int = 0


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
        pages: int = 0,
    ) -> None:
        self.layers, self.d, self.slots, self.width, self.rows = layers, d, slots, width, rows
        self.device, self.dtype = device, dtype
        self.labels, self.pages = slots + MOST_JOINED + 3, pages  # three: the base, the bare base and `OTHER`

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.gate_LSd = zeros(layers, slots, d)
        self.bias_LS = zeros(layers, slots)
        self.carry_S = zeros(slots)
        self.threshold_S = torch.full((slots,), torch.inf, device=device)  # inf: detached, can never fire
        self.ceiling_S = torch.full((slots,), torch.inf, device=device)
        # Of a block of width h the first 2h rows: W_in, then W_gate, so that one product does both.
        self.w_up_SLud = zeros(slots, layers, 2 * width, d, dtype=dtype)
        self.w_out_SLhd = zeros(slots, layers, width, d, dtype=dtype)  # transposed, as rows of h are filled
        self.width_LS = zeros(layers, slots, dtype=torch.int32)  # 0: no block
        self.attached: set[int] = set()
        # NaN: nothing came before. A row belongs to one running request.
        self.state_LRS = torch.full((layers, rows, slots), torch.nan, device=device)
        self.page_state_LNS = torch.full((layers, pages, slots), torch.nan, device=device)

        self._fired_LS = zeros(layers, slots, dtype=torch.int64)
        self._seen_LS = zeros(layers, slots, dtype=torch.int64)
        self._has_block_LS = zeros(layers, slots, dtype=torch.int64)  # 1 where the slot's adapter has a block
        self._mass_S = zeros(slots, dtype=torch.float64)
        self._cross_KS = zeros(self.labels, slots, dtype=torch.int64)
        self._blocks: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(slots)]  # views, by slot and layer
        self._carries = [0.0] * slots
        self._room = zeros(0)  # for the carried logits of a step, grown to the largest so far
        self._look_at_attached()
        self._step: _Step | None = None

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
        self._blocks[slot] = []
        for layer, block in enumerate(adapter.blocks):
            h = 0 if block is None else block.h
            up_ud, out_hd = self.w_up_SLud[slot, layer, : 2 * h], self.w_out_SLhd[slot, layer, :h]
            if block is None:
                self.gate_LSd[layer, slot] = 0
                self.bias_LS[layer, slot] = _SHUT
            else:
                self.gate_LSd[layer, slot].copy_(block.gate)
                self.bias_LS[layer, slot].copy_(block.bias)
                up_ud[:h].copy_(block.w_in)
                up_ud[h:].copy_(block.w_gate)
                out_hd.copy_(block.w_out.T)
            self._blocks[slot].append((up_ud, out_hd))
            self.width_LS[layer, slot] = h
            yield
        self.carry_S[slot] = self._carries[slot] = adapter.info.carry
        self.ceiling_S[slot] = adapter.info.ceiling
        self.state_LRS[:, :, slot] = torch.nan
        self.page_state_LNS[:, :, slot] = torch.nan
        self._has_block_LS[:, slot] = self.width_LS[:, slot] > 0
        self.threshold_S[slot] = threshold
        self.attached.add(slot)
        self._look_at_attached()

    def detach(self, slot: int) -> None:
        """Shut a slot at once; its memory is reused by the next attach."""
        self.threshold_S[slot] = torch.inf
        self.attached.discard(slot)
        self._look_at_attached()

    def set_threshold(self, slot: int, threshold: float) -> None:
        """Turn an attached adapter's dial; takes effect with the next step."""
        self.threshold_S[slot] = threshold

    def forget_row(self, row: int) -> None:
        """Clear a row's carried state: its next token starts a sequence."""
        self.state_LRS[:, row] = torch.nan

    def recall_row(self, row: int, page: int) -> None:
        """Set a row's carried state to that at a page's end, for all slots: its next token follows that page."""
        self.state_LRS[:, row] = self.page_state_LNS[:, page]

    # Steps

    def begin(self, tokens: StepTokens) -> None:
        """Start a step; `add_residues` follows once for every layer, in order."""
        if not self.attached:
            return
        self._step = self._prepared(tokens)

    def add_residues(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """y plus the residues of the selected adapters whose gate fired; x and y are [..., d], y may be reused.

        Where no gate fired y is returned as it came, to the bit.
        """
        step = self._step
        if step is None:
            return y
        step.layers_done = layer + 1
        x_Td = x.reshape(-1, self.d)
        over_Tn = self._gates(layer, x_Td, step)
        # The one value read of a layer. NaN, too, goes on to where every gate is looked at.
        if float(over_Tn.max()) <= 0:
            return y
        step.opened = True
        g_Tn = self._gate_values(over_Tn, step.selected_Tn)
        return self._add_blocks(layer, x_Td, y.reshape(-1, self.d), g_Tn).view_as(y)

    def end(self) -> Tensor | None:
        """Finish the step. Layers whose gate was open by token and slot, int32 [T, S]; None: no gate was.

        Slots that were not selected are observed too: times `selected_TS` it is what acted. Not to be written to.
        After a step that was cut short all states and statistics are as before it.
        """
        step, self._step = self._step, None
        if step is None or step.layers_done < self.layers:
            return None
        self._keep(step)
        return self._count_open(step.tokens, step.m_LTn, step.threshold) if step.opened else None

    def read_totals(self) -> Totals:
        """Read the statistics and set them to zero."""
        counters = (self._fired_LS, self._seen_LS, self._mass_S, self._cross_KS)
        fired, seen, mass, cross = (counter.tolist() for counter in counters)
        for counter in counters:
            counter.zero_()
        return Totals(fired, seen, mass, cross)

    def _prepared(self, tokens: StepTokens) -> _Step:
        """What the layers of a step share, made once."""
        n, T = self._columns, len(tokens.row_T)
        row_P = tokens.row_T if tokens.longest == 1 else tokens.row_T[tokens.last_P]
        if self.layers * T * n > len(self._room):
            self._room = torch.empty(self.layers * T * n, device=self.device)
        carries = StepCarries.of(
            self.carry_S[:n],
            max(self._carries[:n]),
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
        up_ud, out_hd = self._blocks[slot][layer]
        in_fh, gate_fh = F.linear(x_fd, up_ud).chunk(2, dim=1)
        return F.silu(gate_fh).mul_(in_fh).mul_(g_f[:, None].to(x_fd.dtype)), out_hd

    def _keep(self, step: _Step) -> None:
        """Keep the carried logits of each piece's last token, and of those that end pages, and who was selected."""
        tokens, m_LTn = step.tokens, step.m_LTn
        last_LPn = m_LTn if tokens.longest == 1 else m_LTn.index_select(1, tokens.last_P)
        self._state_LRn.index_copy_(1, step.row_P, last_LPn)
        if tokens.end_E is not None and tokens.page_E is not None:
            self._page_state_LNn.index_copy_(1, tokens.page_E, m_LTn.index_select(1, tokens.end_E))
        self._seen_LS.addcmul_(self._has_block_LS, tokens.selected_TS[: tokens.counted].sum(0))

    def _count_open(self, tokens: StepTokens, m_LTn: Tensor, threshold: Tensor) -> Tensor:
        """Layers open by token and slot, [T, S]; adds them, and what acted, to the statistics."""
        n, counted = self._columns, tokens.counted
        over_LTn = m_LTn - threshold
        # Adapters that were not selected are observed, for the live interference matrix, but add nothing.
        open_TS = F.pad((over_LTn > 0).sum(0, dtype=torch.int32), (0, self.slots - n))
        g_LTn = self._gate_values(over_LTn, tokens.selected_TS[:, :n])[:, :counted]
        self._fired_LS[:, :n] += (g_LTn > 0).sum(1)
        # A stream or a gate gone wild must not leave NaN or infinity in the totals for ever.
        self._mass_S[:n] += g_LTn.nan_to_num_(posinf=0.0).sum((0, 1), dtype=torch.float64)
        self._cross_KS.index_add_(0, tokens.label_T[:counted], open_TS[:counted].to(torch.int64))
        return open_TS

    def _look_at_attached(self) -> None:
        """Gates are evaluated in slots 0 to the highest attached, in eights.

        A product's rounding changes with its width, and a load should not move the gates of others; nor is a
        narrower product faster.
        """
        highest = max(self.attached, default=-1)
        self._columns = min(self.slots, (highest + 8) // 8 * 8)
        self._gate_L = self.gate_LSd[:, : self._columns].unbind()
        self._bias_L = self.bias_LS[:, : self._columns].unbind()
        self._threshold_n = self.threshold_S[: self._columns]
        self._state_LRn = self.state_LRS[:, :, : self._columns]
        self._page_state_LNn = self.page_state_LNS[:, :, : self._columns]
