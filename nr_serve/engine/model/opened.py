"""Which gates opened in which page of a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from torch import Tensor

from nr_serve.engine.cache.neutrality import Opened
from nr_serve.engine.scheduler import Piece, spans


def opened_by_page(
    pieces: Sequence[Piece], open_TS: Tensor, selected_TS: Tensor, page_size: int
) -> list[tuple[Opened, ...]]:
    """For each piece, the gates that opened in each page its tokens lie in; empty if nothing opened in the step.

    `open_TS`: number of layers whose gate was open, by token of the step and slot, whether the slot was selected
    or not.
    Shape suffixes: T tokens, S slots, N (token, slot) pairs with an open gate.
    """
    token_N, slot_N = np.nonzero(open_TS.cpu().numpy())
    if not len(token_N):
        return [()] * len(pieces)
    pages = [_page_starts(piece, *span, page_size) for piece, span in zip(pieces, spans(pieces), strict=True)]
    starts = [start for own in pages for start in own]
    page_N = np.searchsorted(starts, token_N, side="right") - 1
    acts_N = selected_TS.cpu().numpy()[token_N, slot_N]
    acted: list[set[int]] = [set() for _ in starts]
    would_act: list[set[int]] = [set() for _ in starts]
    for page, slot, acts in zip(page_N.tolist(), slot_N.tolist(), acts_N.tolist(), strict=True):
        (acted if acts else would_act)[page].add(slot)
    found = [Opened(frozenset(a), frozenset(o)) for a, o in zip(acted, would_act, strict=True)]
    return [tuple(found[start:end]) for start, end in pairwise(accumulate(map(len, pages), initial=0))]


def _page_starts(piece: Piece, first: int, end: int, page_size: int) -> list[int]:
    """The first token in each page, among the piece's tokens [first, end) of the step."""
    return [first, *range(first + page_size - piece.start % page_size, end, page_size)]
