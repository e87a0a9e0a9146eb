"""An adapter's blocks as modules, attached to a base for training and measuring.

Shape suffixes: B windows, T tokens (of all windows laid end to end), d width of the stream, h of a block,
f fired tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nr_serve.neutral import host
from nr_serve.neutral.format import Adapter, Block
from nr_serve.neutral.math import block_gate, gate_logit, residue
from nr_serve.neutral.scan import segmented_carry

LocalTerm = Callable[[Tensor, Tensor], Tensor]
"""(residue [f, d], FFN output [f, d]) -> scalar, the tokens' summed local loss."""


class BlockModule(nn.Module):
    """One layer's block and its gate, as parameters."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.gate = nn.Parameter(block.gate.clone())
        self.bias = nn.Parameter(block.bias.clone())
        self.w_in = nn.Parameter(block.w_in.clone())
        self.w_gate = nn.Parameter(block.w_gate.clone())
        self.w_out = nn.Parameter(block.w_out.clone())

    def gates(self, x_Td: Tensor, offset_T: Tensor, carry: float, threshold: float = 0.0) -> Tensor:
        """Block gate of every token, [T], float32; the carry starts anew where the offset is 0."""
        z_T1 = gate_logit(x_Td, self.gate, self.bias)[:, None]
        m_T1 = z_T1 if carry == 0 else segmented_carry(z_T1, z_T1.new_tensor([carry]), offset_T)
        return block_gate(m_T1[:, 0], threshold)

    def residue(self, x_fd: Tensor, g_f: Tensor) -> Tensor:
        """What the block adds to the FFN's output, [f, d]."""
        return residue(x_fd, g_f, *(w.to(x_fd.dtype) for w in (self.w_in, self.w_gate, self.w_out)))

    def export(self, dtype: torch.dtype) -> Block:
        """The block as an adapter file holds it: weights in `dtype`, gate in float32.

        The gate's threshold lies close to the logits it must tell apart; bfloat16 would move it.
        """
        weights = (w.detach().to(dtype).clone() for w in (self.w_in, self.w_gate, self.w_out))
        return Block(self.gate.detach().float().clone(), self.bias.detach().float().clone(), *weights)


class AdapterModule(nn.Module):
    """One adapter: a block a layer, None where a layer has none."""

    def __init__(self, blocks: Sequence[Block | None], carry: float, threshold: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): BlockModule(b) for i, b in enumerate(blocks) if b is not None})
        self.depth = len(blocks)
        self.carry = carry
        self.threshold = threshold

    @classmethod
    def fresh(cls, layers: int, d: int, h: int, carry: float, seed: int) -> AdapterModule:
        """Blocks before training: W_out = 0; W_in, W_gate and the gates normal with variance 1 / (d L).

        Source: arXiv 2410.02744, section 3 (a smaller start than He's 2 / d).
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) / math.sqrt(d * layers)

        blocks = [
            Block(normal(d), torch.zeros(()), normal(h, d), normal(h, d), torch.zeros(d, h)) for _ in range(layers)
        ]
        return cls(blocks, carry)

    @classmethod
    def from_file(cls, adapter: Adapter) -> AdapterModule:
        """The blocks of an adapter file, in float32."""
        blocks = [
            b and Block(b.gate.float(), b.bias.float(), b.w_in.float(), b.w_gate.float(), b.w_out.float())
            for b in adapter.blocks
        ]
        return cls(blocks, adapter.info.carry, adapter.info.threshold)

    def layer(self, i: int) -> BlockModule | None:
        """Layer i's block, if it has one."""
        module = dict(self.layers.items()).get(str(i))
        assert module is None or isinstance(module, BlockModule)
        return module

    def drop(self, i: int) -> None:
        """Leave layer i without a block."""
        del self.layers[str(i)]

    def export(self, dtype: torch.dtype) -> tuple[Block | None, ...]:
        """The blocks as an adapter file holds them."""
        modules = [self.layer(i) for i in range(self.depth)]
        return tuple(None if module is None else module.export(dtype) for module in modules)


@dataclass
class Pass:
    """What one forward pass reads and gathers: per adapter and layer, how many tokens fired."""

    offset_T: Tensor
    """Each token's place in its document's piece, all windows laid end to end."""
    local: LocalTerm | None = None
    """Gathers the local loss of the tokens in `local_T`."""
    local_T: Tensor | None = None
    """The tokens with a local loss (None: all), bool [T]."""
    fired: list[list[int]] = field(default_factory=list)
    """Tokens that fired, by adapter and layer."""
    blocks: list[int] = field(default_factory=list)
    """Layers with a block, by adapter."""
    local_sum: Tensor | None = None
    """Sum of the local terms, over tokens and layers."""

    def fired_share(self, adapter: int) -> float:
        """Share of token-layers that fired, of the layers where the adapter has a block."""
        return sum(self.fired[adapter]) / (self.blocks[adapter] * self.offset_T.numel())


class Attached:
    """The residues of every attached adapter, added to each layer's FFN; hosted once on a model.

    The block is computed for fired tokens alone: elsewhere the gate is exactly 0, so leaving it out changes
    neither the output nor any gradient.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[AdapterModule]) -> None:
        self.adapters = list(adapters)
        self.before: Callable[[int, Tensor], None] | None = None
        """Called with (layer, x [T, d]) before the layer's gates are evaluated."""
        self.now = Pass(torch.zeros(0, dtype=torch.int64))
        host.host_blocks(model, self._add)

    def begin(self, offset_BT: Tensor, local: LocalTerm | None = None, local_BT: Tensor | None = None) -> Pass:
        """Start a forward pass over those windows; the returned record fills up as the model runs."""
        self.now = Pass(offset_BT.flatten(), local, None if local_BT is None else local_BT.flatten())
        self.now.fired = [[0] * adapter.depth for adapter in self.adapters]
        self.now.blocks = [len(adapter.layers) for adapter in self.adapters]
        return self.now

    def _add(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        x_Td, y_Td = x.flatten(0, -2), y.flatten(0, -2)
        if self.before is not None:
            self.before(layer, x_Td)
        out_Td = y_Td
        for which, adapter in enumerate(self.adapters):
            module = adapter.layer(layer)
            if module is not None:
                out_Td = self._add_one(layer, which, module, x_Td, y_Td, out_Td)
        return out_Td.view_as(y)

    def _add_one(
        self, layer: int, which: int, module: BlockModule, x_Td: Tensor, y_Td: Tensor, out_Td: Tensor
    ) -> Tensor:
        adapter, now = self.adapters[which], self.now
        streams_grad = torch.is_grad_enabled()
        # Where the stream carries no gradient, a local loss still needs one through this layer's block alone.
        with torch.set_grad_enabled(streams_grad or now.local is not None):
            g_T = module.gates(x_Td, now.offset_T, adapter.carry, adapter.threshold)
            index_f = g_T.detach().nonzero()[:, 0]
            now.fired[which][layer] = index_f.numel()
            if index_f.numel() == 0:
                return out_Td
            every = index_f.numel() == g_T.numel()
            x_fd, g_f = (x_Td, g_T) if every else (x_Td[index_f], g_T[index_f])
            r_fd = module.residue(x_fd, g_f)
            if now.local is not None:
                self._gather_local(r_fd, y_Td, index_f)
        r_fd = r_fd if streams_grad else r_fd.detach()
        return out_Td + r_fd if every else out_Td.index_add(0, index_f, r_fd)

    def _gather_local(self, r_fd: Tensor, y_Td: Tensor, index_f: Tensor) -> None:
        now = self.now
        assert now.local is not None
        if now.local_T is not None:
            kept = now.local_T[index_f]
            r_fd, index_f = r_fd[kept], index_f[kept]
        term = now.local(r_fd, y_Td.detach()[index_f])
        now.local_sum = term if now.local_sum is None else now.local_sum + term


def window_inputs(offset_BT: Tensor) -> dict[str, Tensor]:
    """Positions and mask that keep a window's documents apart; the mask only where a window has several."""
    inputs = {"position_ids": offset_BT}
    place_T = torch.arange(offset_BT.shape[1])
    if bool((offset_BT == place_T).all()):
        return inputs
    document_BT = (offset_BT == 0).cumsum(dim=1)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    causal_TT = place_T[:, None] >= place_T[None, :]
    return inputs | {"attention_mask": (same_BTT & causal_TT)[:, None]}
