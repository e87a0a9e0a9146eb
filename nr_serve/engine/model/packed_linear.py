"""Linear layers on a CPU with packed weights, which speed up batches of a few tokens most.

With torch's plain layout a weight is rearranged in every product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nr_serve.neutral import huge_pages
from nr_serve.neutral.pairs import VECTOR, write_pairs

Multiply = Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
"""Type of `CpuOperators.multiply`."""

_PACKED_FOR = 8
"""Number of tokens that oneDNN's layout is chosen for; 8 and 32 gave the same layout."""
_KEEP_BYTES = 2**30
"""Bases up to this size also keep the plain float32 weights: they make products of one token a quarter faster."""


class PackedLinear(nn.Module):
    """Computes what an `nn.Linear` with this weight and bias does, up to rounding, by oneDNN."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, keep: bool) -> None:
        """Pack the weight [out, in]. With `keep` the plain weight stays, for single tokens. Requires `can_pack`."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.weight = weight if keep else None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_FOR)
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if self.weight is not None and x.numel() == self.in_features:
            return F.linear(x, self.weight, self.bias)
        product: Tensor = self._multiply(x, self._packed, self.bias, "none", [], "")
        return product


class PairedLinear(nn.Module):
    """Computes what an `nn.Linear` with this bfloat16 weight and bias does, up to rounding, by our own product."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, multiply: Multiply, dtype: torch.dtype, packed: Tensor
    ) -> None:
        """Pack the weight [out, in] into `packed`, flat. Outputs are of `dtype`, float32 or bfloat16.

        Requires `can_pair`.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.packed = packed
        write_pairs(packed, weight.detach())
        self._multiply, self._dtype = multiply, dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self._multiply(x.contiguous(), self.packed, self.bias, self._dtype)


def can_pair(weight: Tensor) -> bool:
    """Whether our own product supports a weight [out, in]."""
    return weight.dtype is torch.bfloat16 and weight.shape[0] % VECTOR == 0 and weight.shape[1] % 2 == 0


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU have oneDNN's products of packed weights, in this dtype."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))


@torch.no_grad()
def pack_linears(model: nn.Module, multiply: Multiply | None = None) -> None:
    """Pack every plain `nn.Linear` of a frozen model on a CPU, in place; change nothing if that is unsupported.

    Weights are packed for `multiply` where it supports them, else for oneDNN. In bfloat16, single tokens are
    faster with packed weights too, so no plain weight is kept; in float32, a weight shared with the embedding
    exists anyway and is kept. Our own product leaves the output head's logits in float32: rounded to bfloat16, the
    likeliest tokens are often equal. Its weights lie end to end, layer by layer.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not can_pack(weight.dtype):
        return
    exact = weight.dtype is torch.float32
    keep = exact and sum(p.nbytes for p in model.parameters()) <= _KEEP_BYTES
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = [
        (module, name)  # not the layer itself: it is given back once it is packed
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear
    ]
    sizes = [
        weight.numel() if multiply is not None and can_pair(weight) else 0
        for weight in (getattr(module, name).weight for module, name in linears)
    ]
    room = huge_pages.zeros((sum(sizes),), dtype=torch.bfloat16, device=weight.device, taken=False)
    for (module, name), own in zip(linears, torch.split(room, sizes), strict=True):
        child = getattr(module, name)
        if multiply is not None and len(own):
            dtype = torch.float32 if name == "lm_head" else torch.bfloat16
            setattr(module, name, PairedLinear(child.weight, child.bias, multiply, dtype, own))
        else:
            shared = exact and id(child.weight) in embedded
            setattr(module, name, PackedLinear(child.weight, child.bias, keep=keep or shared))
