"""Adapters attached to a base for training and measuring: what their blocks add in a pass, and what fired.

Shape suffixes: B windows, T tokens (all windows laid end to end), d stream width, f tokens that fired.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nr_serve.neutral import host
from nr_serve.train.activations import GATES
from nr_serve.train.blocks import AdapterModule, BlockModule
from nr_serve.train.losses import LayerOutput, LocalLoss, open_hinge

OnGates = Callable[[int, int, Tensor], None]
"""Called with (adapter, layer, gates [T]) where the adapter has a block."""


@dataclass
class ForwardPass:
    """Input and counts of one forward pass: how many tokens fired, for each adapter and layer."""

    offset_T: Tensor
    """Each token's offset in its document's piece, all windows laid end to end."""
    local: LocalLoss | None = None
    """If given, computes each layer's local loss; the terms are summed in `local_sum`."""
    target_T: Tensor | None = None
    """Which tokens are target text, bool [T]; None: no token is."""
    fired: list[list[int]] = field(default_factory=list)
    """Number of tokens that fired, by adapter and layer."""
    fired_target: list[list[int]] = field(default_factory=list)
    """Number of target tokens that fired, by adapter and layer."""
    blocks: list[int] = field(default_factory=list)
    """Number of layers with a block, by adapter."""
    local_sum: Tensor | None = None
    """Sum of the local terms, over tokens and layers."""
    hinges: MutableSequence[Tensor] | None = None
    """If given, each layer's hinge loss on the target's gates is appended to it."""
    on_gates: OnGates | None = None

    def on_target(self, adapter: int) -> tuple[int, int]:
        """Token-layers of target text where the adapter has a block: (fired, all)."""
        target = 0 if self.target_T is None else int(self.target_T.sum())
        return sum(self.fired_target[adapter]), self.blocks[adapter] * target

    def on_others(self, adapter: int) -> tuple[int, int]:
        """Token-layers of all other text where the adapter has a block: (fired, all)."""
        fired, seen = self.on_target(adapter)
        return sum(self.fired[adapter]) - fired, self.blocks[adapter] * self.offset_T.numel() - seen

    def add_gates(self, adapter: int, layer: int, over_T: Tensor, g_T: Tensor, index_f: Tensor) -> None:
        """Record a layer's gates; `index_f` are the tokens with an open gate, `over_T` is m less the threshold."""
        self.fired[adapter][layer] = index_f.numel()
        if self.target_T is not None:
            self.fired_target[adapter][layer] = int(self.target_T[index_f].sum())
            if self.hinges is not None:
                self.hinges.append(open_hinge(over_T, self.target_T))
        if self.on_gates is not None:
            self.on_gates(adapter, layer, g_T.detach())

    def add_local(self, local: LocalLoss, m_T: Tensor, r_fd: Tensor, ffn_Td: Tensor, index_f: Tensor) -> None:
        """Add a layer's local loss, from its residues on the tokens `index_f`."""
        target_T = torch.zeros_like(m_T, dtype=torch.bool) if self.target_T is None else self.target_T
        other_f = ~target_T[index_f]
        term = local(LayerOutput(m_T, target_T, r_fd[other_f], ffn_Td.detach()[index_f[other_f]]))
        if term.requires_grad:
            self.local_sum = term if self.local_sum is None else self.local_sum + term


class Attached:
    """Adds the residues of every attached adapter to each layer's FFN. Created once per model.

    The block is computed for fired tokens only. Elsewhere the gate is exactly 0, so skipping the block changes
    neither the output nor any gradient.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[AdapterModule]) -> None:
        self.adapters = list(adapters)
        self.before: Callable[[int, Tensor], None] | None = None
        """Called with (layer, x [T, d]) before the layer's gates are evaluated."""
        self.now = ForwardPass(torch.zeros(0, dtype=torch.int64))
        host.host_blocks(model, self._add)

    def begin(
        self, offset_BT: Tensor, local: LocalLoss | None = None, target_BT: Tensor | None = None
    ) -> ForwardPass:
        """Start a forward pass over these windows; the model fills the returned record as it runs."""
        self.now = ForwardPass(offset_BT.flatten(), local, None if target_BT is None else target_BT.flatten())
        self.now.fired = [[0] * adapter.depth for adapter in self.adapters]
        self.now.fired_target = [[0] * adapter.depth for adapter in self.adapters]
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
            m_T = module.carried(x_Td, now.offset_T, adapter.carry)
            over_T = m_T - adapter.threshold
            g_T = GATES[adapter.kind](over_T)
            index_f = g_T.detach().nonzero()[:, 0]
            now.add_gates(which, layer, over_T, g_T, index_f)
            every = index_f.numel() == g_T.numel()
            x_fd, g_f = (x_Td, g_T) if every else (x_Td[index_f], g_T[index_f])
            r_fd = module.residue(x_fd, g_f) if index_f.numel() else x_fd
            if now.local is not None:
                now.add_local(now.local, m_T, r_fd, y_Td, index_f)
        if index_f.numel() == 0:
            return out_Td
        r_fd = (r_fd if streams_grad else r_fd.detach()).to(out_Td.dtype)
        return out_Td + r_fd if every else out_Td.index_add(0, index_f, r_fd)
