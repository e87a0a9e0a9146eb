"""Paged attention as one of transformers' attention functions, so that no model is rewritten.

Registered as "nr_paged" with a mask function that returns None: who may attend to whom is the batch's business.
Shape suffixes: T tokens of a step, H query heads, K key heads, G = H / K, D head size, B, n, N as in `Group`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from nr_serve.engine.batch import Batch, Group
from nr_serve.errors import UnsupportedBase

NAME = "nr_paged"
_KNOWN = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal"}


class KVCache:
    """Keys and values of every layer, in cells of one token; pages are runs of cells."""

    def __init__(
        self, *, layers: int, cells: int, heads: int, head_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (layers, cells + 1, heads, head_size)
        self.keys_LCKD = torch.zeros(shape, device=device, dtype=dtype)
        self.values_LCKD = torch.zeros(shape, device=device, dtype=dtype)
        self.spare_cell = cells
        """A cell that is never written: it stands in where there is nothing to attend to."""

    def written(self, module: nn.Module, cells_T: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, [C, K, D], those of a step, [1, K, T, D], now in its cells."""
        layer: Any = module.layer_idx
        keys_CKD, values_CKD = self.keys_LCKD[layer], self.values_LCKD[layer]
        keys_CKD.index_copy_(0, cells_T, key[0].transpose(0, 1))
        values_CKD.index_copy_(0, cells_T, value[0].transpose(0, 1))
        return keys_CKD, values_CKD


def register() -> None:
    """Make the attention known to transformers; again is harmless."""
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def refuse_unknown(attention_mask: Tensor | None, dropout: float, unknown: Mapping[str, Any]) -> None:
    """Raise UnsupportedBase if the model asks for something that is not computed here."""
    asked = sorted(k for k, v in unknown.items() if v is not None and k not in _KNOWN)
    if asked or dropout or attention_mask is not None:
        raise UnsupportedBase(f"attention needs {', '.join(asked) or 'a mask or dropout'}, which is not supported")


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    nr_batch: Batch,
    nr_cache: KVCache,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a step. query [1, H, T, D], key and value [1, K, T, D]; gives [1, T, H, D].

    Raises UnsupportedBase if the model asks for something this function does not compute.
    """
    refuse_unknown(attention_mask, dropout, unknown)
    keys_CKD, values_CKD = nr_cache.written(module, nr_batch.cells_T, key, value)
    query_THD = query[0].transpose(0, 1)
    repeats = query_THD.shape[1] // keys_CKD.shape[1]
    outputs = [
        _attend(
            query_THD, keys_CKD, values_CKD, group, nr_batch.bias(i, sliding_window, repeats, query.dtype), scaling
        )
        for i, group in enumerate(nr_batch.groups)
    ]
    return torch.cat(outputs)[None], None


def _attend(
    query_THD: Tensor,
    keys_CKD: Tensor,
    values_CKD: Tensor,
    group: Group,
    bias_B1QN: Tensor,
    scaling: float | None,
) -> Tensor:
    """One group's attention, [B * n, H, D]."""
    n, last = group.count, group.first + group.pieces * group.count
    _, H, D = query_THD.shape
    K = keys_CKD.shape[1]
    # The G query heads of a key head become further queries of it, so keys are not repeated.
    query_BKGnD = query_THD[group.first : last].view(-1, n, K, H // K, D).permute(0, 2, 3, 1, 4)
    out_BKQD = F.scaled_dot_product_attention(
        query_BKGnD.reshape(-1, K, (H // K) * n, D),
        _gather(keys_CKD, group.cells_BN),
        _gather(values_CKD, group.cells_BN),
        attn_mask=bias_B1QN,
        scale=scaling,
    )
    out_BnKGD = out_BKQD.view(-1, K, H // K, n, D).permute(0, 3, 1, 2, 4)
    return out_BnKGD.reshape(-1, H, D)


def _gather(cache_CKD: Tensor, cells_BN: Tensor) -> Tensor:
    """Keys or values of the cells, [B, K, N, D]."""
    # On a CPU index_select copies whole rows, which takes half the time of indexing.
    gathered_XKD = cache_CKD.index_select(0, cells_BN.flatten())
    return gathered_XKD.view(*cells_BN.shape, *cache_CKD.shape[1:]).transpose(1, 2)
