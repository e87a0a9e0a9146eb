"""CUDA graphs of decode steps: captured once a size, replayed on buffers that stay where they are.

A graph records addresses, not contents. The bank fills its slots in place, and the cache its cells, so a change of
adapters, thresholds or pages leaves every graph valid. A step with fewer tokens than a graph's size is padded with
tokens that write to a row, a cell and a page that nobody reads, and that select no slot.

Shape suffixes: B tokens of a graph, M pages of the longest context, S slots, F integers per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nr_serve.engine.model.batch import Table
from nr_serve.engine.model.forward import run_model
from nr_serve.engine.scheduler import Piece
from nr_serve.neutral.step import StepTokens

if TYPE_CHECKING:
    from nr_serve.engine.model.attention import KVCache
    from nr_serve.neutral.gpu_bank import GpuBank  # needs triton

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FIELDS = 7  # token id, position, cell, row, label, page that the token fills up or -1, context length
# After these fields come the slots (1 where selected), then the pages of the context.


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One step of single tokens, as tensors of one graph size."""

    input_ids_T: Tensor
    positions_T: Tensor
    cells_T: Tensor
    table: Table
    """Page table of the tokens' contexts."""
    tokens: StepTokens
    """Here `page_E` is -1 for a token that does not fill up a page."""


Outputs = tuple[Tensor, Tensor | None]
"""Logits [B, V]; open layers by token and slot [B, S], or None if nothing is attached."""

Step = Callable[[DecodeBatch, bool], Outputs]
"""(batch, whether any adapter is attached) -> outputs."""
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]
"""(function) -> (replay function, the output tensors that each replay overwrites)."""


class Decoded(NamedTuple):
    """Outputs of a step; valid until the next step."""

    logits_BV: Tensor
    open_BS: Tensor | None
    """Number of open layers by token and slot; None if nothing is attached."""
    selected_BS: Tensor


@dataclass(frozen=True, slots=True)
class Padding:
    """Where a graph's padding tokens write: nobody reads it."""

    row: int
    page: int
    label: int


def size_of(tokens: int, sizes: Sequence[int] = SIZES) -> int | None:
    """The smallest graph size that holds this many tokens; None if none does."""
    return next((size for size in sorted(sizes) if size >= tokens), None)


class Graphs:
    """Owns the graphs and their buffers. Use from one thread only."""

    def __init__(
        self,
        step: Step,
        *,
        slots: int,
        page_size: int,
        longest: int,
        padding: Padding,
        device: torch.device,
        sizes: Sequence[int] = SIZES,
        capture: Capture | None = None,
    ) -> None:
        """`step` runs the model on a batch without waiting for the host; `longest`: longest context in tokens."""
        self.sizes = tuple(sorted(sizes))
        self._step = step
        self._capture = capture or (capture_cuda() if device.type == "cuda" else uncaptured)
        self._slots, self._page_size, self._padding = slots, page_size, padding
        self._most_pages = -(-longest // page_size)
        self._device = device
        self._buffers: dict[int, Tensor] = {}
        self._graphs: dict[tuple[int, bool], tuple[Callable[[], None], Outputs]] = {}

    @property
    def captured(self) -> int:
        """Number of graphs captured so far."""
        return len(self._graphs)

    def warm_up(self) -> None:
        """Capture every size, with and without the bank, so that no request waits for it."""
        for size in reversed(self.sizes):  # the largest first: the others can share its memory
            for attached in (True, False):
                self._graph(size, attached)

    def run(self, pieces: Sequence[Piece], labels: Sequence[int], *, attached: bool) -> Decoded | None:
        """Run one step of single tokens; None if there are more than the largest graph holds.

        `attached`: whether any adapter is attached. Without one, another graph runs, in which the bank does no
        work.
        """
        size, n = size_of(len(pieces), self.sizes), len(pieces)
        if size is None:
            return None
        replay, (logits_BV, open_BS) = self._graph(size, attached)
        self._fill(size, pieces, labels)
        replay()
        selected_BS = self._selected(self._buffers[size])
        return Decoded(logits_BV[:n], None if open_BS is None else open_BS[:n], selected_BS[:n])

    def _graph(self, size: int, attached: bool) -> tuple[Callable[[], None], Outputs]:
        """The graph of a size, captured on first use.

        Capturing runs the step, so it runs on padding only: a real token must advance its request's carried state
        once.
        """
        key = (size, attached)
        if key not in self._graphs:
            self._fill(size, [], [])
            packed_FB = self._buffers[size]
            self._graphs[key] = self._capture(lambda: self._step(self._batch(packed_FB), attached))
        return self._graphs[key]

    def _fill(self, size: int, pieces: Sequence[Piece], labels: Sequence[int]) -> None:
        """Write the step into the buffer of its size."""
        shape = (_FIELDS + self._slots + self._most_pages, size)
        if size not in self._buffers:
            self._buffers[size] = torch.zeros(shape, dtype=torch.int32, device=self._device)
        packed = np.zeros(shape, dtype=np.int32)
        used = _FIELDS + self._slots + self._write(packed, pieces, labels)
        step = torch.from_numpy(packed[:used])
        # Pinned, so that the copy does not block; torch reuses the pinned memory only when the copy is done.
        step = step.pin_memory() if self._device.type == "cuda" else step
        self._buffers[size][:used].copy_(step, non_blocking=True)

    def _write(self, packed_FB: np.ndarray, pieces: Sequence[Piece], labels: Sequence[int]) -> int:
        """Write the step into zeros; returns the number of pages of the longest context."""
        n, size, padding = len(pieces), self._page_size, self._padding
        table_MB = packed_FB[_FIELDS + self._slots :]
        padded = (0, 0, padding.page * size, padding.row, padding.label, -1, 1)
        packed_FB[:_FIELDS, n:] = np.array(padded)[:, None]
        table_MB[0, n:] = padding.page
        longest = 1
        for i, (piece, label) in enumerate(zip(pieces, labels, strict=True)):
            request, position = piece.request, piece.start
            pages = request.pages[: position // size + 1]
            cell = pages[-1] * size + position % size
            ended = pages[-1] if position % size == size - 1 else -1
            token = request.tokens[position]
            packed_FB[:_FIELDS, i] = (token, position, cell, request.row, label, ended, position + 1)
            for version in request.selection or ():
                assert version.slot is not None
                packed_FB[_FIELDS + version.slot, i] = 1
            table_MB[: len(pages), i] = pages
            longest = max(longest, len(pages))
        return longest

    def _selected(self, packed_FB: Tensor) -> Tensor:
        """Which slots each token selects, bool [B, S]."""
        return packed_FB[_FIELDS : _FIELDS + self._slots].T != 0

    def _batch(self, packed_FB: Tensor) -> DecodeBatch:
        """The buffer as a batch. This is part of the capture: a replay unpacks what the buffer then holds."""
        ids, positions, cells, rows, labels, ended = packed_FB[: _FIELDS - 1].long()
        each = torch.arange(packed_FB.shape[1], device=packed_FB.device)
        tokens = StepTokens(
            offset_T=torch.zeros_like(each),
            row_T=rows,
            last_P=each,
            selected_TS=self._selected(packed_FB),
            label_T=labels,
            longest=1,
            end_E=each,
            page_E=ended,
        )
        table = Table(packed_FB[_FIELDS + self._slots :].T, packed_FB[_FIELDS - 1], self._page_size)
        return DecodeBatch(ids, positions, cells, table, tokens)


def model_step(model: Any, bank: GpuBank, cache: KVCache) -> Step:
    """The step that graphs capture: the model with its bank and its KV cache, without waiting for the host."""

    def step(batch: DecodeBatch, attached: bool) -> Outputs:
        if attached:
            bank.begin(batch.tokens, always=True)
        return run_model(model, bank, cache, batch)

    return step


def uncaptured(function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Stands in for a capture where there is no CUDA: each replay calls the function."""
    outputs = function()

    def replay() -> None:
        for kept, new in zip(outputs, function(), strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)

    return replay, outputs


def capture_cuda() -> Capture:
    """Captures on the current device, into one memory pool, which is safe because graphs run one after another."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]  # one: cuBLAS allocates for each

    def capture(function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        here = torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            function()  # on the first call kernels compile and libraries allocate memory
        here.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = function()
        finally:
            torch.cuda.set_stream(here)  # a failed capture leaves its own stream set
        return graph.replay, outputs

    return capture
