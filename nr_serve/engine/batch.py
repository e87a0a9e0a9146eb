"""A step's pieces as tensors: where every token goes and what it may look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from nr_serve.engine.scheduler import Piece
from nr_serve.neutral.step import StepTokens, Trial

_FEW_IN_PIECE = 8  # a group more for a piece of so few costs more than reading its context for each of them


@dataclass(frozen=True, slots=True)
class Group:
    """Pieces of one length, whose attention is computed together.

    Shape suffixes: B pieces, n tokens of each, N longest context.
    """

    first: int
    """Index in the step of the group's first token; the tokens of its pieces lie end to end."""
    pieces: int
    count: int
    cells_BN: Tensor
    """KV cells of each piece's context, in order; the spare cell stands in where a context is shorter."""
    positions_Bn: Tensor
    """Places of the tokens in the contexts: each may attend to those up to its own."""


@dataclass(slots=True)
class Batch:
    """One step, laid end to end: T tokens, decodes first."""

    input_ids_T: Tensor
    positions_T: Tensor
    cells_T: Tensor
    """KV cell each token's key and value go to: page * page_size + place in the page."""
    groups: list[Group]
    tokens: StepTokens
    _biases: dict[tuple[int, int | None, int, int], Tensor] = field(default_factory=dict)
    _rows: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def bias(self, group: int, window: int | None, heads: int, repeats: int, dtype: torch.dtype) -> Tensor:
        """What is added to a group's attention logits: 0 where a query may look, else -inf; [Z, n * repeats, N].

        Only the last `window` positions if given. Z = B * heads: it is the same for all key heads, and for the
        `repeats` query heads that each has. Made once a step, as every layer of a kind asks for the same.
        """
        key = (group, window, heads, repeats)
        if key not in self._biases:
            visible_BnN = self._visible(self.groups[group], window)
            bias_BnN = torch.zeros_like(visible_BnN, dtype=dtype).masked_fill(~visible_BnN, -torch.inf)
            bias_BQN = bias_BnN.repeat_interleave(repeats, dim=1)
            self._biases[key] = bias_BQN[:, None].expand(-1, heads, -1, -1).flatten(0, 1)
        return self._biases[key]

    def rows(self, group: int, heads: int) -> Tensor:
        """Where a group's context stands among a layer's keys [C * K, D], head by head; [B * K * N]."""
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
    device: torch.device,
) -> Batch:
    """Lay the pieces end to end. They must be ordered by length, but one on trial comes last.

    `labels` has one entry per piece.

    `spare_cell` is a KV cell that is never written and holds zeros. With `recalls_pages` the bank is told where
    pages end, to keep the carried state there. Pieces of up to 8 tokens, and of up to `apart` tokens times context,
    attend as so many single tokens (None: none do): it pays where these attend by an operator of their own.
    """
    counts = np.array([p.count for p in pieces])
    ends = np.cumsum(counts)
    positions = np.concatenate([np.arange(p.start, p.start + p.count) for p in pieces])
    offsets = np.concatenate([np.arange(n) for n in counts])
    piece_of = np.repeat(np.arange(len(pieces)), counts)
    input_ids = np.concatenate([p.request.tokens[p.start : p.start + p.count] for p in pieces])
    cells = [_cells(p, page_size) for p in pieces]
    written = np.concatenate([c[p.start :] for c, p in zip(cells, pieces, strict=True)])

    selected = np.zeros((len(pieces), slots), dtype=bool)
    for i, piece in enumerate(pieces):
        own = [version.slot for version in piece.request.selection or ()]
        assert None not in own
        selected[i, own] = True  # type: ignore[index]
    rows = np.array([p.request.row for p in pieces])
    page_ends = np.flatnonzero((positions + 1) % page_size == 0) if recalls_pages else positions[:0]

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    tokens = StepTokens(
        offset_T=put(offsets),
        row_T=put(rows[piece_of]),
        last_P=put(ends - 1),
        selected_TS=put(selected[piece_of]),
        label_T=put(np.array(labels)[piece_of]),
        longest=int(counts.max()),
        end_E=put(page_ends) if len(page_ends) else None,
        page_E=put(written[page_ends] // page_size) if len(page_ends) else None,
        trial=_trial(pieces[-1], int(ends[-1])),
    )
    return Batch(
        input_ids_T=put(input_ids.astype(np.int64)),
        positions_T=put(positions),
        cells_T=put(written),
        groups=_groups(pieces, cells, apart, spare_cell, device),
        tokens=tokens,
    )


def _trial(piece: Piece, end: int) -> Trial | None:
    if piece.trial is None:
        return None
    (version,) = piece.request.selection or ()
    assert version.slot is not None
    return Trial(first=end - piece.count, slot=version.slot, threshold=piece.trial)


def _cells(piece: Piece, page_size: int) -> np.ndarray:
    """KV cells of the piece's request, from its first token to the piece's last."""
    pages = np.array(piece.request.pages)
    cells = (pages[:, None] * page_size + np.arange(page_size)).reshape(-1)
    return cells[: piece.start + piece.count]


def _groups(
    pieces: Sequence[Piece], cells: list[np.ndarray], apart: int | None, spare_cell: int, device: torch.device
) -> list[Group]:
    """Groups of single tokens, and one for each longer piece: prompts' chunks differ too much in context."""
    groups: list[Group] = []
    first = 0
    for kind, run in groupby(range(len(pieces)), key=lambda i: _kind(i, pieces[i], apart)):
        own = [(pieces[i], cells[i]) for i in run]
        if isinstance(kind, str):
            own = [token for piece, context in own for token in _tokens(piece, context)]
        groups.append(_group(own, first, spare_cell, device))
        first += sum(piece.count for piece, _ in own)
    return groups


def _kind(i: int, piece: Piece, apart: int | None) -> str | int:
    """Which pieces attend as one group: single tokens and pieces of few; short prompts, which would pad those far.

    A longer piece is a group by itself, for which its index stands.
    """
    if piece.count == 1 or (apart is not None and piece.count <= _FEW_IN_PIECE):
        return "few"
    return "short" if apart is not None and piece.count * (piece.start + piece.count) <= apart else i


def _tokens(piece: Piece, context: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
    """A piece as so many single tokens."""
    for end in range(piece.start + 1, piece.start + piece.count + 1):
        yield Piece(piece.request, end - 1, 1), context[:end]


def _group(own: Sequence[tuple[Piece, np.ndarray]], first: int, spare_cell: int, device: torch.device) -> Group:
    pieces, cells = [piece for piece, _ in own], [context for _, context in own]
    count = pieces[0].count
    # Not a cell in use: what is masked out still meets a weight of 0, and 0 times another request's NaN is NaN.
    padded = np.full((len(pieces), max(map(len, cells))), spare_cell, dtype=np.int64)
    for row, context in zip(padded, cells, strict=True):
        row[: len(context)] = context
    positions = np.array([p.start for p in pieces])[:, None] + np.arange(count)
    return Group(
        first=first,
        pieces=len(pieces),
        count=count,
        cells_BN=torch.from_numpy(padded).to(device),
        positions_Bn=torch.from_numpy(positions).to(device),
    )
