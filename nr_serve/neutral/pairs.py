"""The layout of weights that our own bfloat16 products read on a CPU (`engine/model/cpu/tiles.h`).

Outputs are in blocks; in each, the inputs come two by two, and of each two those of all the block's outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

VECTOR = 16
"""Outputs that one register holds; layers have a multiple of them."""
BLOCK = 48
"""Outputs that are computed together."""


def write_pairs(to: Tensor, weight: Tensor, block: int = BLOCK) -> None:
    """Write a bfloat16 weight [outputs, inputs] in this layout to `to`, which is flat and of its size.

    Inputs are even in number, outputs a multiple of `VECTOR`. `block`: outputs of a block.
    """
    if weight.storage_offset() % 2 or not weight.is_contiguous():
        weight = weight.clone(memory_format=torch.contiguous_format)  # else two of it cannot be seen as one
    pairs, to = weight.view(torch.int32), to.view(torch.int32)
    whole = len(pairs) // block * block
    for rows, outputs in ((pairs[:whole], block), (pairs[whole:], len(pairs) - whole)):
        if len(rows):
            blocks = rows.view(-1, outputs, rows.shape[1]).transpose(1, 2)
            to[: rows.numel()].view(blocks.shape).copy_(blocks)
            to = to[rows.numel() :]
