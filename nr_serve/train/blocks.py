"""An adapter's blocks as modules: what trains.

Shape suffixes: T tokens (all windows laid end to end), d stream width, h block width, f tokens that fired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from nr_serve.neutral.format import Adapter, Block
from nr_serve.neutral.math import gate_logit, residue
from nr_serve.neutral.scan import segmented_carry

Variance = Callable[[int, int], float]
"""(stream width d, number of layers L) -> initial variance of a weight."""


def paper_variance(d: int, layers: int) -> float:
    """1 / (d L), the initial variance in arXiv 2410.02744, section 3."""
    return 1 / (d * layers)


def he_variance(d: int, layers: int) -> float:
    """2 / d, for layers followed by a ReLU (He et al., arXiv 1502.01852); `layers` is not used."""
    return 2 / d


VARIANCE: dict[str, Variance] = {"paper": paper_variance, "he": he_variance}
"""Initial variances, by the recipe's names for them."""


class BlockModule(nn.Module):
    """One layer's block and its gate, as parameters."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.gate = nn.Parameter(block.gate.clone())
        self.bias = nn.Parameter(block.bias.clone())
        self.w_in = nn.Parameter(block.w_in.clone())
        self.w_gate = nn.Parameter(block.w_gate.clone())
        self.w_out = nn.Parameter(block.w_out.clone())

    def carried(self, x_Td: Tensor, offset_T: Tensor, carry: float) -> Tensor:
        """Carried logit of every token, float32 [T]; the carry restarts where the offset is 0."""
        with torch.autocast(x_Td.device.type, enabled=False):  # autocast would compute the product in bfloat16
            z_T1 = gate_logit(x_Td, self.gate, self.bias)[:, None]
        return segmented_carry(z_T1, z_T1.new_tensor([carry]), offset_T)[:, 0]

    def residue(self, x_fd: Tensor, g_f: Tensor) -> Tensor:
        """What the block adds to the FFN's output, [f, d]."""
        return residue(x_fd, g_f, *(w.to(x_fd.dtype) for w in (self.w_in, self.w_gate, self.w_out)))

    def export(self, dtype: torch.dtype) -> Block:
        """The block for an adapter file: weights in `dtype`, gate in float32.

        A gate's threshold lies close to the logits that it must separate; bfloat16 would shift it.
        """
        weights = (w.detach().to(dtype).clone() for w in (self.w_in, self.w_gate, self.w_out))
        return Block(self.gate.detach().float().clone(), self.bias.detach().float().clone(), *weights)


def is_gate(name: str) -> bool:
    """Whether a parameter of an adapter belongs to a gate, by its name."""
    return name.rsplit(".", 1)[-1] in ("gate", "bias")


def is_out(name: str) -> bool:
    """Whether a parameter is a block's W_out or LoRA's B, by its name; these start at 0."""
    return name.rsplit(".", 1)[-1] == "w_out" or ".lora_B." in name


class AdapterModule(nn.Module):
    """One adapter: a block per layer; some layers may have none."""

    def __init__(
        self, blocks: Sequence[Block | None], carry: float, threshold: float = 0.0, kind: str = "relu"
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): BlockModule(b) for i, b in enumerate(blocks) if b is not None})
        self.depth = len(blocks)
        self.carry = carry
        self.threshold = threshold
        self.kind = kind

    @classmethod
    def fresh(
        cls,
        widths: Sequence[int],
        d: int,
        carry: float,
        seed: int,
        variance: Variance = paper_variance,
        gate_variance: Variance = paper_variance,
        kind: str = "relu",
    ) -> AdapterModule:
        """Blocks before training, of width h for each layer (0: no block): W_out = 0, all else normal with mean 0.

        W_in and W_gate have the variance `variance(d, layers)`, the gate's w has `gate_variance(d, layers)`. The
        kind `none` has w = 0, b = 1 and no carry: its gate is 1, except on a text's first token.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(variance: Variance, *shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * math.sqrt(variance(d, len(widths)))

        def block(h: int) -> Block:
            w, b = normal(gate_variance, d), torch.zeros(())
            if kind == "none":
                w, b = torch.zeros(d), torch.ones(())
            return Block(w, b, normal(variance, h, d), normal(variance, h, d), torch.zeros(d, h))

        blocks = [block(h) if h else None for h in widths]
        return cls(blocks, 0.0) if kind == "none" else cls(blocks, carry, kind=kind)

    @classmethod
    def from_file(cls, adapter: Adapter) -> AdapterModule:
        """The blocks of an adapter file, in float32."""
        blocks = [
            b and Block(b.gate.float(), b.bias.float(), b.w_in.float(), b.w_gate.float(), b.w_out.float())
            for b in adapter.blocks
        ]
        return cls(blocks, adapter.info.carry, adapter.info.threshold, adapter.info.gate)

    def layer(self, i: int) -> BlockModule | None:
        """Layer i's block, if it has one."""
        if str(i) not in self.layers:
            return None
        module = self.layers[str(i)]
        assert isinstance(module, BlockModule)
        return module

    def gates(self) -> dict[str, Tensor]:
        """Every gate's w and b, by parameter name."""
        return {name: p.detach().cpu() for name, p in self.named_parameters() if is_gate(name)}

    def set_gates(self, gates: Mapping[str, Tensor]) -> None:
        """Replace the gates; a layer whose gate is not in `gates` loses its block."""
        self.keep(gates)
        self.load_state_dict(dict(gates), strict=False)

    def keep(self, names: Collection[str]) -> None:
        """Drop the block of every layer whose gate is not among `names` (of parameters)."""
        for layer in list(self.layers):
            if f"layers.{layer}.gate" not in names:
                self.drop(int(layer))

    def drop(self, i: int) -> None:
        """Drop the block of layer i."""
        del self.layers[str(i)]

    def export(self, dtype: torch.dtype) -> tuple[Block | None, ...]:
        """The blocks for an adapter file."""
        modules = [self.layer(i) for i in range(self.depth)]
        return tuple(None if module is None else module.export(dtype) for module in modules)
