"""CUDA graphs of decode steps: captured once a size, replayed on buffers that stay where they are.

A graph holds addresses, not contents. The bank fills its slots in place and the cache its cells, so swaps of
adapters, thresholds and pages leave every graph valid. A step of fewer tokens than a graph's size is padded with
tokens that write to a row, a cell and a page that nobody reads, and act on nothing.

Shape suffixes: B tokens of a graph, M pages of the longest context, S slots, F integers a token.
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
_FIELDS = 7  # token id, position, cell, row, label, page that the token ends or -1, length of the context
# Then come the slots, 1 where selected, and the pages of the context.


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One step of single tokens, on tensors of one graph size."""

    input_ids_T: Tensor
    positions_T: Tensor
    cells_T: Tensor
    table: Table
    """The tokens' contexts."""
    tokens: StepTokens
    """Its `page_E` is -1 for a token that ends no page."""


Outputs = tuple[Tensor, Tensor | None]
"""Logits [B, V], and layers open by token and slot [B, S], or None where nothing is attached."""

Step = Callable[[DecodeBatch, bool], Outputs]
"""(batch, whether the bank acts in it) -> outputs."""
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]
"""(function) -> (replay, the tensors that each replay fills anew)."""


class Decoded(NamedTuple):
    """What a step gave; good until the next step."""

    logits_BV: Tensor
    open_BS: Tensor | None
    """Layers open by token and slot; None: nothing is attached."""
    selected_BS: Tensor


@dataclass(frozen=True, slots=True)
class Padding:
    """What the tokens write to that only fill a graph up: nobody reads it."""

    row: int
    page: int
    label: int


def size_of(tokens: int, sizes: Sequence[int] = SIZES) -> int | None:
    """The smallest graph that holds so many tokens; None if none does."""
    return next((size for size in sorted(sizes) if size >= tokens), None)


class Graphs:
    """Owns the graphs and their buffers. From one thread."""

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
        """`step` runs the model on a batch, on the device alone; `longest` is the longest context in tokens."""
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
        """Graphs captured so far."""
        return len(self._graphs)

    def warm_up(self) -> None:
        """Capture every size, with the bank and without, so that no request waits for it."""
        for size in reversed(self.sizes):  # the largest first, whose memory the others can share
            for attached in (True, False):
                self._graph(size, attached)

    def run(self, pieces: Sequence[Piece], labels: Sequence[int], *, attached: bool) -> Decoded | None:
        """One step of single tokens; None if they are more than the largest graph holds.

        `attached`: whether any adapter is. Without one the bank adds no work, which is another graph.
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
        """The graph of a size, captured if this is the first time.

        Capturing runs the step, so it is one of padding: a request's carried state must move on once a token.
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
        # Pinned, so that nobody waits; torch keeps it from other use until the copy is done.
        step = step.pin_memory() if self._device.type == "cuda" else step
        self._buffers[size][:used].copy_(step, non_blocking=True)

    def _write(self, packed_FB: np.ndarray, pieces: Sequence[Piece], labels: Sequence[int]) -> int:
        """Fill zeros; returns the pages of the longest context."""
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
        """Bool [B, S]."""
        return packed_FB[_FIELDS : _FIELDS + self._slots].T != 0

    def _batch(self, packed_FB: Tensor) -> DecodeBatch:
        """The buffer as a batch. Part of what is captured: the graph unpacks whatever the buffer holds."""
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
    """A step as graphs capture it: the model with its bank and its KV cache, all on the device."""

    def step(batch: DecodeBatch, attached: bool) -> Outputs:
        if attached:
            bank.begin(batch.tokens, always=True)
        return run_model(model, bank, cache, batch)

    return step


def uncaptured(function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """In the place of a capture where there is no CUDA: each replay calls the function."""
    outputs = function()

    def replay() -> None:
        for kept, new in zip(outputs, function(), strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)

    return replay, outputs


def capture_cuda() -> Capture:
    """Captures on the current device, into one pool of memory: graphs run one after the other."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]  # one: cuBLAS keeps memory for each

    def capture(function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        here = torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            function()  # kernels compile, and libraries take their memory, the first time
        here.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = function()
        finally:
            torch.cuda.set_stream(here)  # which a capture that fails leaves at its own
        return graph.replay, outputs

    return capture
