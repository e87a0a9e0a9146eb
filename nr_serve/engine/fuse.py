"""Norms, FFNs and attention of decoder layers on a CPU, each in a few operators of `cpu_operators.cpp`.

Only for classes of transformers that are known to compute just this; all others stay as they are. The start-up
check (`probe.py`) holds the result against the model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nr_serve.engine.attention import KVCache, attend, refuse_unknown
from nr_serve.engine.batch import Batch
from nr_serve.engine.cpu_operators import CpuOperators

_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
_FFNS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}
_SILUS = {"SiLU", "SiLUActivation"}
_ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention"}


class FusedNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich, 2019)."""

    def __init__(self, norm: Any, operators: CpuOperators) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, float(norm.variance_epsilon)
        self._rms_norm = operators.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to the same."""
        return self._rms_norm(x.contiguous(), self.weight, self.eps)


class FusedFFN(nn.Module):
    """SwiGLU (Shazeer, 2020): gate and up are one product."""

    def __init__(self, ffn: Any, operators: CpuOperators) -> None:
        super().__init__()
        self.gate_up, self.down = _joined(ffn.gate_proj, ffn.up_proj), ffn.down_proj
        self._silu_mul = operators.silu_mul

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to the same."""
        down: Tensor = self.down(self._silu_mul(self.gate_up(x)))
        return down


class FusedAttention(nn.Module):
    """Attention with rotary embeddings over the KV pages: queries, keys and values are one product."""

    def __init__(self, attention: Any, operators: CpuOperators) -> None:
        super().__init__()
        self.qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = attention.o_proj
        self.layer_idx: int = attention.layer_idx
        self.scaling: float = attention.scaling
        self.window = _window(attention)
        self._rotate = operators.rotate

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        *,
        nr_batch: Batch,
        nr_cache: KVCache,
        **unknown: Any,
    ) -> tuple[Tensor, None]:
        """[1, T, d] to the same, as a layer's own attention is called."""
        refuse_unknown(attention_mask, 0.0, unknown)
        keys_CKD, values_CKD = nr_cache.keys_LCKD[self.layer_idx], nr_cache.values_LCKD[self.layer_idx]
        query_THD = self._rotate(
            self.qkv(hidden_states), *position_embeddings, keys_CKD, values_CKD, nr_batch.cells_T
        )
        out_THD = attend(query_THD, keys_CKD, values_CKD, nr_batch, self.window, self.scaling, nr_cache.operators)
        return self.out(out_THD.flatten(1)[None]), None


def fuse(model: nn.Module, operators: CpuOperators) -> None:
    """Replace, in place, the parts of a frozen model that are known; their weights move, none is copied twice."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            fused = _fused(child, operators)
            if fused is not None:
                setattr(module, name, fused)


def _fused(module: Any, operators: CpuOperators) -> nn.Module | None:
    name = type(module).__name__
    if not type(module).__module__.startswith("transformers.models."):
        return None
    if name in _NORMS:
        return FusedNorm(module, operators)
    if name in _FFNS and type(module.act_fn).__name__ in _SILUS:
        return FusedFFN(module, operators)
    if name in _ATTENTIONS:
        return FusedAttention(module, operators)
    return None


def _window(attention: Any) -> int | None:
    """How many positions back a layer's attention looks, its own included."""
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)


@torch.no_grad()
def _joined(*linears: nn.Linear) -> nn.Linear:
    """One linear layer whose outputs are those of several, in order."""
    weight = torch.cat([linear.weight for linear in linears])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if linears[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return joined
