"""Random blocks: what they compute is of no use, only what they cost."""

from __future__ import annotations

import torch

from nr_serve.neutral.format import Block


def random_blocks(
    layers: int, d: int, width: int, bias: float, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Block, ...]:
    """A block per layer, on the generator's device, whose gate is its bias: above 0 it fires on every token."""

    def block() -> Block:
        parts = torch.randn(3, width, d, generator=generator, device=generator.device) / d**0.5
        w_in, w_gate, w_out = parts.to(dtype)
        return Block(torch.zeros(d, device=w_in.device), torch.tensor(bias), w_in, w_gate, 0.01 * w_out.T)

    return tuple(block() for _ in range(layers))
