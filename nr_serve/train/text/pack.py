"""Packs documents into windows of tokens.

Shape suffixes: N windows, T tokens per window.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nr_serve.train.text import overlap
from nr_serve.train.text.frames import text_beginning

BATCH_DOCUMENTS = 256
NEAR = 32
"""When a window's end cuts a word, the rest of the document starts at the next word within this many tokens."""


@dataclass(frozen=True)
class Windows:
    """Token ids, and each token's offset in its document's piece (0 starts one), both int64 [N, T]."""

    ids_NT: Tensor
    offset_NT: Tensor

    def __len__(self) -> int:
        return self.ids_NT.shape[0]

    @property
    def labelled(self) -> int:
        """Number of tokens with a next token in their document and window: those that the LM loss is over."""
        return int((self.offset_NT != 0).sum())

    def take(self, rows: slice | Sequence[int]) -> Windows:
        """The windows with these row numbers."""
        return Windows(self.ids_NT[rows], self.offset_NT[rows])

    def spread(self, count: int) -> Windows:
        """At most `count` windows, evenly from all of them: neighbours are often of one document."""
        count = min(count, len(self))
        return self.take([i * len(self) // count for i in range(count)])

    def to(self, device: torch.device) -> Windows:
        """The windows, moved to a device."""
        return Windows(self.ids_NT.to(device), self.offset_NT.to(device))


@dataclass(frozen=True)
class Packed:
    """Windows, and the 8-grams of the documents they were cut from (see `overlap`), int64 [G]."""

    windows: Windows
    grams: Tensor


def join(parts: Iterable[Windows]) -> Windows:
    """All windows of `parts`, in order."""
    listed = list(parts)
    return Windows(torch.cat([part.ids_NT for part in listed]), torch.cat([part.offset_NT for part in listed]))


def pack(
    tokenizer: Any,
    documents: Sequence[str],
    window: int,
    limit: int | None,
    seed: int,
    *,
    special_tokens: bool = True,
) -> Packed:
    """Documents in shuffled order, laid end to end and cut into windows; at most about `limit` tokens.

    When a window's end cuts a document, the document continues in the next window as a new piece with offset 0.
    The new piece begins as served text does, with the tokenizer's BOS, if it has one, and at the start of a word:
    tokens before the next word are left out, if the tokenizer reports words and one begins within `NEAR` tokens.

    `special_tokens`: whether the tokenizer adds its own, such as BOS; a chat template has already added them.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    beginning = text_beginning(tokenizer)
    ids, starts = array("i"), array("q")  # 4 bytes per token; a list of ints would take ten times as much
    used = 0
    while used < len(order) and (limit is None or len(ids) < limit):
        encoded = tokenizer(order[used : used + BATCH_DOCUMENTS], add_special_tokens=special_tokens)
        for i, tokens in enumerate(encoded["input_ids"]):
            words = encoded.word_ids(i) if encoded.is_fast else [None] * len(tokens)
            at = 0
            while at < len(tokens):
                starts.append(len(ids))
                if at:
                    ids.extend(beginning)
                room = window - len(ids) % window
                ids.extend(tokens[at : at + room])
                at = _next_word(words, at + room)
        used += BATCH_DOCUMENTS
    count = (len(ids) if limit is None else min(limit, len(ids))) // window
    ids_NT = torch.from_numpy(np.array(ids[: count * window], np.int64)).view(count, window)
    return Packed(Windows(ids_NT, _offsets(starts, count, window)), overlap.grams(order[:used]))


def _next_word(words: Sequence[int | None], at: int) -> int:
    """The first token from `at` on that begins a new word; `at` if there is none near."""
    near = range(at, min(at + NEAR, len(words)))
    return next((place for place in near if words[place] != words[place - 1]), at)


def _offsets(starts: Sequence[int], count: int, window: int) -> Tensor:
    """Distance of every token to the last start of a piece in its window; every window's start is one."""
    is_start = torch.zeros(count * window, dtype=torch.bool)
    starts_S = torch.tensor(starts, dtype=torch.int64)
    is_start[starts_S[starts_S < count * window]] = True
    place_T = torch.arange(window)
    last_start_NT = torch.where(is_start.view(count, window), place_T, 0).cummax(dim=1).values
    return place_T - last_start_NT
