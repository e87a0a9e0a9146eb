"""Which gates opened in which page of a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from torch import Tensor

from nr_serve.engine.neutrality import Opened
from nr_serve.engine.scheduler import Piece, spans


def opened_by_page(
    pieces: Sequence[Piece], open_TS: Tensor, selected_TS: Tensor, page_size: int
) -> list[tuple[Opened, ...]]:
    """For each piece, what opened in each page that its tokens lie in; nothing if the whole step opened nothing.

    `open_TS` counts the layers whose gate was open, by token of the step and slot, whether selected or not. Shape
    suffixes: T tokens, S slots, G pages of all the pieces.
    """
    is_open_TS, selected = open_TS.cpu().numpy() > 0, selected_TS.cpu().numpy()
    if not is_open_TS.any():
        return [()] * len(pieces)
    pages = [_page_starts(piece, *span, page_size) for piece, span in zip(pieces, spans(pieces), strict=True)]
    start_G = [start for own in pages for start in own]
    acted, observed = (
        _slots(np.logical_or.reduceat(opened_TS, start_G, axis=0))
        for opened_TS in (is_open_TS & selected, is_open_TS & ~selected)
    )
    found = [Opened(*both) for both in zip(acted, observed, strict=True)]
    return [tuple(found[start:end]) for start, end in pairwise(accumulate(map(len, pages), initial=0))]


def _page_starts(piece: Piece, first: int, end: int, page_size: int) -> list[int]:
    """Which of the step's tokens [first, end), the piece's, are its first in a page."""
    return [first, *range(first + page_size - piece.start % page_size, end, page_size)]


def _slots(opened_GS: np.ndarray) -> list[frozenset[int]]:
    """The slots of each row that are set."""
    found: list[list[int]] = [[] for _ in opened_GS]
    for row, slot in np.argwhere(opened_GS).tolist():
        found[row].append(slot)
    return [frozenset(slots) for slots in found]
