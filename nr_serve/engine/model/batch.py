"""A step's pieces as tensors: where every token goes and what it may look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby

import numpy as np
import torch
from torch import Tensor

from nr_serve.engine.adapters.registry import Selection
from nr_serve.engine.model.device import placed
from nr_serve.engine.scheduler import Piece
from nr_serve.neutral.step import StepTokens, Trial

_FEW_IN_PIECE = 8  # a separate group for so few tokens costs more than reading the context once per token


@dataclass(frozen=True, slots=True)
class Group:
    """Pieces of the same length, whose attention is computed together.

    Shape suffixes: B pieces, n tokens per piece, N longest context.
    """

    first: int
    """Index in the step of the group's first token; the pieces' tokens lie end to end."""
    pieces: int
    count: int
    cells_BN: Tensor
    """KV cells of each piece's context, in order; a shorter context is padded with the spare cell."""
    positions_Bn: Tensor
    """Positions of the tokens in their contexts: each attends to positions up to its own."""


@dataclass(frozen=True, slots=True)
class Table:
    """Page table: where contexts lie in the KV cache.

    Shape suffixes: B contexts, M pages of the longest.
    """

    pages_BM: Tensor
    """int32. Each context's pages, in order; entries beyond its length must not be read."""
    length_B: Tensor
    """int32. Length of each context in tokens, those of the step included."""
    page_size: int


@dataclass(frozen=True, slots=True)
class PagedGroup:
    """Like `Group`, for attention through page tables: many single tokens, or one piece of several tokens."""

    first: int
    """Index in the step of the group's first token."""
    pieces: int
    count: int
    """Tokens per piece."""
    table: Table
    """Page table of the pieces' contexts."""
    longest: int
    """Length of the longest context, in tokens."""


@dataclass(slots=True)
class Batch:
    """One step's tokens, laid end to end: T tokens, decodes first."""

    input_ids_T: Tensor
    positions_T: Tensor
    cells_T: Tensor
    """KV cell that each token's key and value are written to: page * page_size + offset in the page."""
    tokens: StepTokens
    groups: list[Group] = field(default_factory=list)
    paged: list[PagedGroup] = field(default_factory=list)
    """Used instead of `groups` if attention is paged."""
    logits_N: Tensor | None = None
    """Indices of the tokens whose logits are wanted; None: all tokens."""
    _biases: dict[tuple[int, int | None, int, int], Tensor] = field(default_factory=dict)
    _rows: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def bias(self, group: int, window: int | None, heads: int, repeats: int, dtype: torch.dtype) -> Tensor:
        """Bias added to a group's attention logits: 0 where a query may attend, else -inf; [Z, n * repeats, N].

        With `window`, a query attends only to its last `window` positions. Z = B * heads. The bias is the same for
        all key heads, and for the `repeats` query heads of each. Cached, because layers with the same window share
        it.
        """
        key = (group, window, heads, repeats)
        if key not in self._biases:
            visible_BnN = self._visible(self.groups[group], window)
            bias_BnN = torch.zeros_like(visible_BnN, dtype=dtype).masked_fill(~visible_BnN, -torch.inf)
            bias_BQN = bias_BnN.repeat_interleave(repeats, dim=1)
            self._biases[key] = bias_BQN[:, None].expand(-1, heads, -1, -1).flatten(0, 1)
        return self._biases[key]

    def rows(self, group: int, heads: int) -> Tensor:
        """Indices of a group's context among a layer's keys viewed as [C * K, D], head by head; [B * K * N]."""
        if (group, heads) not in self._rows:
            first_B1N = self.groups[group].cells_BN[:, None] * heads
            head_K1 = torch.arange(heads, device=first_B1N.device)[:, None]
            self._rows[group, heads] = (first_B1N + head_K1).flatten()
        return self._rows[group, heads]

    @staticmethod
    def _visible(group: Group, window: int | None) -> Tensor:
        context_N = torch.arange(group.cells_BN.shape[1], device=group.cells_BN.device)
        positions_Bn1 = group.positions_Bn[:, :, None]
        visible_BnN = context_N <= positions_Bn1
        return visible_BnN if window is None else visible_BnN & (context_N > positions_Bn1 - window)


def build_batch(
    pieces: Sequence[Piece],
    labels: Sequence[int],
    *,
    page_size: int,
    spare_cell: int,
    slots: int,
    recalls_pages: bool = False,
    apart: int | None = None,
    paged: bool = False,
    positions: Sequence[int] | None = None,
    device: torch.device,
) -> Batch:
    """Lay the pieces end to end. They must be sorted by length; a piece on trial comes last.

    `labels` has one entry per piece. `spare_cell` is a KV cell that is never written and holds zeros. With
    `recalls_pages` the bank is told where pages end, to keep the carried state there. `apart`: pieces of up to 8
    tokens, and those with up to `apart` tokens times context, attend as single tokens (None: none do); this pays
    where single tokens have their own attention operator. With `paged` the batch has `paged` groups. `positions`:
    indices in the step of the tokens whose logits are wanted.
    """
    layout = _Layout.of(pieces, page_size, spare_cell)
    rows = np.array([p.request.row for p in pieces])
    page_ends = np.flatnonzero((layout.position_T + 1) % page_size == 0) if recalls_pages else np.empty(0, np.int64)
    cell_T = layout.cells(layout.piece_T, layout.position_T)
    ids = chain.from_iterable(p.request.tokens[p.start : p.start + p.count] for p in pieces)
    paged_groups = _paged_groups(pieces, layout) if paged else []
    arrays: dict[str | tuple[str, int], np.ndarray] = {
        "input_ids_T": np.fromiter(ids, np.int64, len(layout.piece_T)),
        "positions_T": layout.position_T,
        "cells_T": cell_T,
        "offset_T": layout.offset_T,
        "row_T": rows[layout.piece_T],
        "last_P": layout.end_P - 1,
        "selected_TS": _selected(pieces, slots)[layout.piece_T],
        "label_T": np.array(labels)[layout.piece_T],
    }
    if len(page_ends):
        arrays |= {"end_E": page_ends, "page_E": cell_T[page_ends] // page_size}
    for i, group in enumerate(paged_groups):
        arrays |= {("pages_BM", i): group.page_BM, ("length_B", i): group.length_B}
    if positions is not None:
        arrays["logits_N"] = np.array(positions, np.int64)
    there = dict(zip(arrays, placed(list(arrays.values()), device), strict=True))
    tokens = StepTokens(
        offset_T=there["offset_T"],
        row_T=there["row_T"],
        last_P=there["last_P"],
        selected_TS=there["selected_TS"],
        label_T=there["label_T"],
        longest=max(piece.count for piece in pieces),
        end_E=there.get("end_E"),
        page_E=there.get("page_E"),
        trial=_trial(pieces[-1], int(layout.end_P[-1])),
    )
    return Batch(
        there["input_ids_T"],
        there["positions_T"],
        there["cells_T"],
        tokens,
        groups=[] if paged else _groups(pieces, layout, apart, device),
        paged=[
            PagedGroup(
                group.first,
                len(group.page_BM),
                group.count,
                Table(there["pages_BM", i], there["length_B", i], page_size),
                group.longest,
            )
            for i, group in enumerate(paged_groups)
        ],
        logits_N=there.get("logits_N"),
    )


def _selected(pieces: Sequence[Piece], slots: int) -> np.ndarray:
    """Which slots each piece may use, bool [P, S]. Computed once per selection: most pieces of a step share one."""
    selections = [piece.request.selection or () for piece in pieces]
    masks = {selection: _mask(selection, slots) for selection in set(selections)}
    return np.stack([masks[selection] for selection in selections])


def _mask(selection: Selection, slots: int) -> np.ndarray:
    own = [version.slot for version in selection]
    assert None not in own
    mask = np.zeros(slots, dtype=bool)
    mask[own] = True  # type: ignore[index]
    return mask


def _trial(piece: Piece, end: int) -> Trial | None:
    if piece.trial is None:
        return None
    (version,) = piece.request.selection or ()
    assert version.slot is not None
    return Trial(first=end - piece.count, slot=version.slot, threshold=piece.trial)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Positions of the pieces' tokens. P pieces, G pages of a request."""

    piece_T: np.ndarray
    offset_T: np.ndarray
    """Offset of each token in its piece."""
    position_T: np.ndarray
    """Position of each token in its request."""
    end_P: np.ndarray
    page_PG: np.ndarray
    """Pages of each piece's request, in order, padded with 0."""
    page_size: int
    spare_cell: int

    @classmethod
    def of(cls, pieces: Sequence[Piece], page_size: int, spare_cell: int) -> _Layout:
        count_P, start_P = np.array([(piece.count, piece.start) for piece in pieces]).T
        end_P = np.cumsum(count_P)
        piece_T = np.repeat(np.arange(len(pieces)), count_P)
        offset_T = np.arange(end_P[-1]) - (end_P - count_P)[piece_T]
        page_PG = np.zeros((len(pieces), max(len(piece.request.pages) for piece in pieces)), np.int64)
        for row_G, piece in zip(page_PG, pieces, strict=True):
            row_G[: len(piece.request.pages)] = piece.request.pages
        return cls(piece_T, offset_T, start_P[piece_T] + offset_T, end_P, page_PG, page_size, spare_cell)

    def cells(self, piece: np.ndarray, position: np.ndarray) -> np.ndarray:
        """KV cells of these positions in the requests of these pieces."""
        found: np.ndarray = self.page_PG[piece, position // self.page_size] * self.page_size
        found += position % self.page_size
        return found

    def contexts(self, piece_B: np.ndarray, length_B: np.ndarray) -> np.ndarray:
        """KV cells of each piece's first `length_B` positions, [B, N], padded with the spare cell."""
        # The padding must not be a used cell: masked positions have weight 0, but 0 times another request's NaN is
        # NaN.
        position_N = np.arange(length_B.max())
        inside_BN = position_N < length_B[:, None]
        return np.where(inside_BN, self.cells(piece_B[:, None], position_N), self.spare_cell)


def _groups(pieces: Sequence[Piece], layout: _Layout, apart: int | None, device: torch.device) -> list[Group]:
    """Groups of single tokens, and one group for each longer piece: prompt chunks differ too much in context."""
    groups: list[Group] = []
    first = 0
    for kind, run in groupby(range(len(pieces)), key=lambda i: _kind(i, pieces[i], apart)):
        end = first + sum(pieces[i].count for i in run)
        piece_B, position_Bn = layout.piece_T[first:end], layout.position_T[first:end, None]
        if not isinstance(kind, str):
            piece_B, position_Bn = piece_B[:1], position_Bn.T
        rows, count = position_Bn.shape
        contexts_BN = layout.contexts(piece_B, position_Bn[:, -1] + 1)
        groups.append(Group(first, rows, count, *placed([contexts_BN, position_Bn], device)))
        first = end
    return groups


@dataclass(frozen=True, slots=True)
class _Paged:
    """A `PagedGroup` whose tensors are not on the device yet."""

    first: int
    count: int
    page_BM: np.ndarray
    length_B: np.ndarray
    longest: int


def _paged_groups(pieces: Sequence[Piece], layout: _Layout) -> list[_Paged]:
    """One group for all single tokens, which come first, and one for each longer piece."""
    length_P = np.array([piece.start + piece.count for piece in pieces], np.int32)
    page_PG, singles = layout.page_PG.astype(np.int32), sum(piece.count == 1 for piece in pieces)
    bounds = [(0, singles)] if singles else []
    bounds += [(i, i + 1) for i in range(singles, len(pieces))]
    groups = []
    for first, end in bounds:
        longest = int(length_P[first:end].max())
        used = -(-longest // layout.page_size)
        start = int(layout.end_P[first]) - pieces[first].count
        groups.append(_Paged(start, pieces[first].count, page_PG[first:end, :used], length_P[first:end], longest))
    return groups


def _kind(i: int, piece: Piece, apart: int | None) -> str | int:
    """Key of a piece's group: "few" for single tokens and pieces of few tokens, "short" for short prompts (apart
    from "few", whose contexts they would pad far), else the piece's own index.
    """
    if piece.count == 1 or (apart is not None and piece.count <= _FEW_IN_PIECE):
        return "few"
    return "short" if apart is not None and piece.count * (piece.start + piece.count) <= apart else i
