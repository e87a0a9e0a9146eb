"""Which gates opened in which page of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from nr_serve.engine.neutrality import Opened
from nr_serve.engine.scheduler import Piece


def opened_by_page(
    pieces: Sequence[Piece], open_TS: Tensor, selected_TS: Tensor, page_size: int
) -> list[tuple[Opened, ...]]:
    """For each piece, what opened in each page that its tokens lie in; nothing if the whole step opened nothing.

    `open_TS` counts the layers whose gate was open, by token of the step and slot, whether selected or not. Shape
    suffixes: T tokens, S slots, K kinds (acted, observed), G pages of all the pieces.
    """
    if not open_TS.any():
        return [()] * len(pieces)
    firsts = list(accumulate((_pages(piece, page_size) for piece in pieces), initial=0))
    open_TS = open_TS > 0
    opened_TKS = torch.stack((open_TS & selected_TS, open_TS & ~selected_TS), dim=1)
    places = torch.nonzero(_by_page(opened_TKS, pieces, firsts, page_size)).tolist()
    slots: dict[tuple[int, int], set[int]] = defaultdict(set)
    for page, kind, slot in places:
        slots[page, kind].add(slot)
    found = [Opened(frozenset(slots[page, 0]), frozenset(slots[page, 1])) for page in range(firsts[-1])]
    return [tuple(found[start:end]) for start, end in pairwise(firsts)]


def _pages(piece: Piece, page_size: int) -> int:
    """Pages that a piece's tokens lie in."""
    return (piece.start + piece.count - 1) // page_size - piece.start // page_size + 1


def _by_page(opened_TKS: Tensor, pieces: Sequence[Piece], firsts: Sequence[int], page_size: int) -> Tensor:
    """Non-zero where a token of the page is; [G, K, S]."""
    if firsts[-1] == len(opened_TKS):  # every token lies in a page of its own
        return opened_TKS
    page_T = np.concatenate(
        [
            np.arange(piece.start, piece.start + piece.count) // page_size - piece.start // page_size + first
            for piece, first in zip(pieces, firsts, strict=False)
        ]
    )
    opened_GKS = opened_TKS.new_zeros((firsts[-1], *opened_TKS.shape[1:]), dtype=torch.int32)
    return opened_GKS.index_add_(0, torch.from_numpy(page_T).to(opened_TKS.device), opened_TKS.int())
