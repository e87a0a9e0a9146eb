"""How much of one text is in another: shared runs of eight words.

Words, not tokens: a base's tokenizer may cut a foreign word into single bytes, and eight bytes occur in every text.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nr_serve.train.corpus.clean import MARKS, UNSPACED

GRAM_WORDS = 8

SAMPLED = 8
"""One 8-gram in this many is kept, chosen by its hash, so that two texts keep the same ones."""

FEWEST_GRAMS = 32
"""Texts with fewer kept 8-grams than this (about 250 words) are too short to compare."""

_WORD = re.compile(rf"[{UNSPACED}]|(?:[^\W{UNSPACED}]|[{MARKS}])+")  # including digits, so that tables differ


def grams(documents: Iterable[str]) -> Tensor:
    """The kept 8-grams within each of `documents`: sorted 64-bit hashes without duplicates, int64 [G]."""
    kept = [_kept(document) for document in documents]
    return torch.from_numpy(np.unique(np.concatenate([np.empty(0, np.int64), *kept])))


def overlap(a: Tensor, b: Tensor) -> float:
    """Share of the shorter text's 8-grams that the other text has too, 0 to 1; 0 if one is too short to compare.

    This is the overlap coefficient (Szymkiewicz and Simpson) on 8-grams.
    """
    shorter, longer = sorted((a.numpy(), b.numpy()), key=len)
    if len(shorter) < FEWEST_GRAMS:
        return 0.0
    places = np.searchsorted(longer, shorter).clip(max=len(longer) - 1)
    return float((longer[places] == shorter).mean())


def _kept(document: str) -> NDArray[np.int64]:
    words = np.array([zlib.crc32(word.encode()) for word in _WORD.findall(document.casefold())], np.uint64)
    count = len(words) - GRAM_WORDS + 1
    if count < 1:
        return np.empty(0, np.int64)
    hashes = np.zeros(count, np.uint64)
    for i in range(GRAM_WORDS):
        hashes = _mixed(hashes + words[i : i + count])
    kept: NDArray[np.int64] = hashes[hashes % SAMPLED == 0].view(np.int64)
    return kept


def _mixed(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of MurmurHash3 (64 bits), which makes every bit depend on every other bit."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(factor)
    mixed: NDArray[np.uint64] = hashes ^ (hashes >> np.uint64(33))
    return mixed
