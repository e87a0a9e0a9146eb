"""Paged attention as one of transformers' attention functions, so that no model is rewritten.

Registered as "nr_paged" without a mask function, so that transformers makes no mask: the batch knows who may
attend to whom.
Shape suffixes: T tokens of a step, H query heads, K key heads, G = H / K, D head size, C cells; B, n, N as in
`Group`; Z = B * K, Q = n * G.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from nr_serve.engine.model.batch import Batch, Group
from nr_serve.engine.model.cpu_operators import CpuOperators
from nr_serve.errors import UnsupportedBase
from nr_serve.neutral import huge_pages

NAME = "nr_paged"
_TOKENS_AT_ONCE = 128  # their attention logits stay in a core's cache
_WORTH_PRODUCTS = 512  # tokens times context; with less, the extra operator calls cost more than they save
NO_WINDOW = 2**62
_KNOWN = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal"}
Attend = Callable[[Tensor, Tensor, Tensor, Any, float, int | None], Tensor]
"""Type of `attend_on_cpu` with its operators given, and of `gpu_attention.attend`."""


class KVCache:
    """Keys and values of every layer, in cells of one token each; a page is a run of cells."""

    def __init__(
        self,
        *,
        layers: int,
        cells: int,
        heads: int,
        head_size: int,
        device: torch.device,
        dtype: torch.dtype,
        attend: Attend,
    ) -> None:
        self.attend = attend
        """How a step attends to a layer's keys and values."""
        shape = (layers, cells + 1, heads, head_size)
        self.keys_LCKD = huge_pages.zeros(shape, device=device, dtype=dtype)
        self.values_LCKD = huge_pages.zeros(shape, device=device, dtype=dtype)
        self.spare_cell = cells
        """A cell that is never written: padding where there is nothing to attend to."""

    def written(self, module: nn.Module, cells_T: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values, [1, K, T, D], to their cells; returns the layer's, [C, K, D]."""
        layer: Any = module.layer_idx
        keys_CKD, values_CKD = self.keys_LCKD[layer], self.values_LCKD[layer]
        keys_CKD.index_copy_(0, cells_T, key[0].transpose(0, 1))
        values_CKD.index_copy_(0, cells_T, value[0].transpose(0, 1))
        return keys_CKD, values_CKD


def register() -> None:
    """Register the attention function with transformers; calling it again is harmless."""
    AttentionInterface.register(NAME, paged_attention)


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
    nr_batch: Any,
    nr_cache: KVCache,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a step: query [1, H, T, D], key and value [1, K, T, D]; returns [1, T, H, D].

    `nr_batch` is what the cache's `attend` takes. Raises UnsupportedBase if the model asks for something that is
    not computed here.
    """
    refuse_unknown(attention_mask, dropout, unknown)
    keys_CKD, values_CKD = nr_cache.written(module, nr_batch.cells_T, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_THD = nr_cache.attend(query[0].transpose(0, 1), keys_CKD, values_CKD, nr_batch, scale, sliding_window)
    return out_THD[None], None


def attend_on_cpu(
    query_THD: Tensor,
    keys_CKD: Tensor,
    values_CKD: Tensor,
    batch: Batch,
    scale: float,
    window: int | None,
    operators: CpuOperators | None,
) -> Tensor:
    """Attention of a step over a layer's keys and values, which include the step's own; [T, H, D].

    Logits are multiplied by `scale`. With `window`, each token attends only to its last `window` positions. Each of
    the `operators` is used where it fits the tokens, else torch's own.
    """
    heads, D = keys_CKD.shape[1:]
    repeats = query_THD.shape[1] // heads
    singles = prompts = None
    if operators is not None:
        singles, prompts = operators.attend, operators.prompts_by(query_THD.dtype, D)
    outputs = []
    for i, group in enumerate(batch.groups):
        query_BnHD = query_THD[group.first : group.first + group.pieces * group.count]
        own = singles if group.count == 1 else prompts
        if own is not None:
            out = own(
                query_BnHD.contiguous(),
                keys_CKD,
                values_CKD,
                group.cells_BN,
                group.positions_Bn,
                scale,
                window or NO_WINDOW,
            )
        else:
            rows_X = batch.rows(i, heads)
            bias_ZQN = batch.bias(i, window, heads, repeats, query_THD.dtype)
            out = _attend(query_BnHD, keys_CKD, values_CKD, group, rows_X, bias_ZQN, scale)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(
    query_BnHD: Tensor,
    keys_CKD: Tensor,
    values_CKD: Tensor,
    group: Group,
    rows_X: Tensor,
    bias_ZQN: Tensor,
    scale: float,
) -> Tensor:
    """One group's attention by torch's operators; queries and result [B * n, H, D]."""
    B, n, (_, H, D) = group.pieces, group.count, query_BnHD.shape
    K = keys_CKD.shape[1]
    # The G query heads of a key head are treated as extra queries of that head, so keys are not repeated.
    query_ZQD = query_BnHD.view(B, n, K, H // K, D).transpose(1, 2).reshape(B * K, n * (H // K), D)
    keys_ZND, values_ZND = (
        cache.view(-1, D).index_select(0, rows_X).view(B * K, -1, D) for cache in (keys_CKD, values_CKD)
    )
    if query_BnHD.dtype is torch.bfloat16 and B * n * keys_ZND.shape[1] >= _WORTH_PRODUCTS:
        out_ZQD = _by_products(query_ZQD, keys_ZND, values_ZND, bias_ZQN, scale, n)
    else:
        # A head dimension of 1 is added: torch has no fused attention for three dimensions.
        out_ZQD = F.scaled_dot_product_attention(
            query_ZQD[:, None], keys_ZND[:, None], values_ZND[:, None], attn_mask=bias_ZQN[:, None], scale=scale
        )
    out_BKnGD = out_ZQD.view(B, K, n, H // K, D)
    return out_BKnGD.transpose(1, 2).reshape(B * n, H, D)


def _by_products(
    query_ZQD: Tensor, keys_ZND: Tensor, values_ZND: Tensor, bias_ZQN: Tensor, scale: float, n: int
) -> Tensor:
    """Attention of n tokens by matrix products, [Z, Q, D]: some tokens at a time, over the context up to them.

    In bfloat16 they are many times as fast as torch's fused attention. Logits are rounded to bfloat16,
    as in transformers' own attention.
    """
    Q, N = bias_ZQN.shape[1:]
    outputs = []
    for first in range(0, n, _TOKENS_AT_ONCE):
        last = min(first + _TOKENS_AT_ONCE, n)
        seen = N - n + last
        rows = slice(first * Q // n, last * Q // n)
        logits_ZqN = torch.baddbmm(
            bias_ZQN[:, rows, :seen], query_ZQD[:, rows], keys_ZND[:, :seen].transpose(1, 2), alpha=scale
        )
        outputs.append(torch.bmm(logits_ZqN.softmax(-1), values_ZND[:, :seen]))
    return torch.cat(outputs, dim=1)
