"""The bank: slots of adapter weights in device memory, and what steps leave in them.

A step's residues are computed by one of three subclasses: `cpu_bank.py` with compiled operators, `gpu_bank.py`
with Triton kernels, and `torch_bank.py` with torch alone where there are neither.

Owns the stacked weights, the carried gate states (one per row, that is per running request, and one at the end of
each KV page), and the gate statistics. It takes flattened hidden states and a per-token selection. It knows
nothing of requests or HTTP, and rows and pages only by number, so that another engine can host it.

Shape suffixes: T tokens of a step, P pieces (runs of tokens of one request), E tokens at page ends in a step, S
slots, R rows, N pages, L layers, K labels, d width of the stream, h width of a slot.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from nr_serve.errors import BadAdapterFile
from nr_serve.neutral import huge_pages
from nr_serve.neutral.format import Adapter, Block
from nr_serve.neutral.step import StepTokens, Totals

_SHUT = -1e30  # bias of a layer without a block: finite, so that its carry stays finite
_COPIED = 2**18  # weights copied between two yields, which takes some tenths of a millisecond


class Bank(ABC):
    """Slots are allocated once. Adapters come and go in place, so device pointers stay valid."""

    _rows = 1  # there is room for a multiple of so many rows of a block

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
        labels: int,
        pages: int = 0,
    ) -> None:
        self.layers, self.d, self.slots, self.width = layers, d, slots, width
        self.device, self.dtype = device, dtype
        self.labels = labels

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.gate_LSd = huge_pages.zeros((layers, slots, d), dtype=torch.float32, device=device)
        self.bias_LS = zeros(layers, slots)
        self.carry_S = zeros(slots)
        self.threshold_S = torch.full((slots,), torch.inf, device=device)  # inf: detached, can never fire
        self.ceiling_S = torch.full((slots,), torch.inf, device=device)
        room = -(-width // self._rows) * self._rows
        # A block of width h uses the first 2h rows: W_in, then W_gate, so that one product computes both.
        self.w_up_SLud = huge_pages.zeros((slots, layers, 2 * room, d), dtype=dtype, device=device)
        # Transposed: a block fills the first h rows.
        self.w_out_SLhd = huge_pages.zeros((slots, layers, room, d), dtype=dtype, device=device)
        self.width_LS = zeros(layers, slots, dtype=torch.int32)  # 0: no block
        self.attached: set[int] = set()
        # NaN: the sequence starts here. A row belongs to one running request.
        self.state_LRS = torch.full((layers, rows, slots), torch.nan, device=device)
        self.page_state_LNS = torch.full((layers, pages, slots), torch.nan, device=device)

        self._fired_LS = zeros(layers, slots, dtype=torch.int64)
        self._seen_LS = zeros(layers, slots, dtype=torch.int64)
        self._mass_S = zeros(slots, dtype=torch.float64)
        self._cross_KS = zeros(self.labels, slots, dtype=torch.int64)

    # Slots

    def check_fits(self, adapter: Adapter) -> None:
        """Raise BadAdapterFile if the adapter's blocks are wider than a slot."""
        if adapter.h > self.width:
            raise BadAdapterFile(
                f"its blocks are {adapter.h} wide, a slot holds {self.width}; "
                f"restart the server with --slot-width {adapter.h}"
            )

    def attach(self, slot: int, adapter: Adapter, threshold: float) -> Iterator[None]:
        """Copy an adapter into a slot, a layer or a part of one between yields.

        The adapter can fire once the iterator is exhausted. Steps may run between yields: until the end the slot's
        threshold is infinite. With an infinite `threshold` the slot stays shut until `set_threshold`.
        """
        self.check_fits(adapter)
        self.detach(slot)
        for layer, block in enumerate(adapter.blocks):
            h = 0 if block is None else block.h
            self.width_LS[layer, slot] = h
            if block is None:
                self.gate_LSd[layer, slot] = 0
                self.bias_LS[layer, slot] = _SHUT
            else:
                self.gate_LSd[layer, slot].copy_(block.gate)
                self.bias_LS[layer, slot].copy_(block.bias)
                yield from self._write(block, self.w_up_SLud[slot, layer], self.w_out_SLhd[slot, layer])
            yield
        self.carry_S[slot] = adapter.info.carry
        self.ceiling_S[slot] = adapter.info.ceiling
        self.state_LRS[:, :, slot] = torch.nan
        self.page_state_LNS[:, :, slot] = torch.nan
        self.threshold_S[slot] = threshold
        self.attached.add(slot)

    def _write(self, block: Block, up_ud: Tensor, out_hd: Tensor) -> Iterator[None]:
        """Write a block's weights to its place in a slot, part by part, with a yield between parts."""
        h = block.h
        yield from _copy_rows(up_ud[:h], block.w_in)
        yield from _copy_rows(up_ud[h : 2 * h], block.w_gate)
        yield from _copy_rows(out_hd[:h], block.w_out.T)

    def detach(self, slot: int) -> None:
        """Shut a slot at once; its memory is reused by the next `attach`."""
        self.threshold_S[slot] = torch.inf
        self.attached.discard(slot)

    def set_threshold(self, slot: int, threshold: float) -> None:
        """Change an attached adapter's threshold, from the next step on."""
        self.threshold_S[slot] = threshold

    def forget_row(self, row: int) -> None:
        """Clear a row's carried state: its next token starts a sequence."""
        self.state_LRS[:, row] = torch.nan

    def recall_row(self, row: int, page: int) -> None:
        """Set a row's carried state, for all slots, to that at a page's end: its next token follows that page."""
        self.state_LRS[:, row] = self.page_state_LNS[:, page]

    # Steps

    @abstractmethod
    def begin(self, tokens: StepTokens) -> None:
        """Start a step; `add_residues` must follow once for every layer, in order.

        If it fails, no step is under way and nothing has changed.
        """

    @abstractmethod
    def add_residues(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """y plus the residues of the selected adapters whose gate fired; x and y are [..., d], y may be reused.

        Tokens on which no gate fired keep their y, bit for bit.
        """

    @abstractmethod
    def end(self) -> Tensor | None:
        """Finish the step; returns the number of layers with an open gate, by token and slot, int32 [T, S].

        Returns None if no gate was open. Slots that were not selected are observed too: multiply by `selected_TS`
        for those that acted. The tensor must not be written to.
        """

    @abstractmethod
    def drop(self) -> None:
        """Abandon a step that failed; states and statistics are as before it, except on a GPU: see `GpuBank`."""

    def read_totals(self) -> Totals:
        """Read the statistics and set them to zero."""
        counters = (self._fired_LS, self._seen_LS, self._mass_S, self._cross_KS)
        fired, seen, mass, cross = (counter.tolist() for counter in counters)
        for counter in counters:
            counter.zero_()
        return Totals(fired, seen, mass, cross)


def parts(rows: int, size: int, of: int = 1) -> Iterator[tuple[int, int]]:
    """Beginnings and ends of the parts in which so many rows of that size are copied, each a multiple of `of` rows.

    The last part may be shorter.
    """
    step = max(1, _COPIED // size // of) * of
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def _copy_rows(to_hd: Tensor, from_hd: Tensor) -> Iterator[None]:
    """Copy a block's rows, part by part, with a yield between parts."""
    for first, end in parts(*to_hd.shape):
        if first:
            yield
        to_hd[first:end].copy_(from_hd[first:end])
