"""Paged attention on a GPU, with the contract of `attention.paged_attention`.

Single tokens read their context where it lies, through a table of pages, by a Triton kernel that cuts long contexts
into parts; it never waits for the host, so a CUDA graph can hold it. A prompt's chunk gathers its context once a
layer, which is little beside its own products, and goes through torch's SDPA.

Shape suffixes: as in `attention`; B single tokens, M longest table, I parts of a context.
"""

# Parameters of Triton's functions are pointers, sizes and strides; annotating them would tell nothing.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, unused-ignore"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from nr_serve.engine.model.attention import KVCache, refuse_unknown
from nr_serve.engine.model.batch import Batch, Group
from nr_serve.engine.model.graphs import DecodeBatch
from nr_serve.neutral.kernels import dot, precision

NAME = "nr_paged_gpu"
PROGRAMS = 512
"""Contexts are cut into parts until there are so many programs, or the parts are short."""
LEAST_PART = 256
"""Tokens of a context that are worth a program of their own."""


@dataclass(frozen=True, slots=True)
class Table:
    """Where the contexts of single tokens lie."""

    pages_BM: Tensor
    """A context's pages in order; what lies beyond its length is not read."""
    length_B: Tensor
    """Tokens of each context, the single token included."""
    page_size: int


def register() -> None:
    """Make the attention known to transformers; again is harmless.

    Not its mask: without one by this name transformers makes none, and asks the device nothing.
    """
    AttentionInterface.register(NAME, paged_attention)


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
    nr_batch: Batch | DecodeBatch,
    nr_cache: KVCache,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a step. query [1, H, T, D], key and value [1, K, T, D]; gives [1, T, H, D].

    Raises UnsupportedBase if the model asks for something this function does not compute.
    """
    refuse_unknown(attention_mask, dropout, unknown)
    keys_CKD, values_CKD = nr_cache.written(module, nr_batch.cells_T, key, value)
    query_THD = query[0].transpose(0, 1)
    scale = query_THD.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(nr_batch, DecodeBatch):
        table = Table(nr_batch.pages_BM, nr_batch.length_B, nr_batch.page_size)
        return attend_one(query_THD, keys_CKD, values_CKD, table, scale, sliding_window)[None], None
    outputs = [_attend(query_THD, keys_CKD, values_CKD, group, scale, sliding_window) for group in nr_batch.groups]
    return torch.cat(outputs)[None], None


def _attend(
    query_THD: Tensor, keys_CKD: Tensor, values_CKD: Tensor, group: Group, scale: float, window: int | None
) -> Tensor:
    """One group's attention, [B * n, H, D]."""
    query_THD = query_THD[group.first : group.first + group.pieces * group.count]
    if group.count == 1:
        table = Table(group.cells_BN, group.positions_Bn[:, 0] + 1, page_size=1)
        return attend_one(query_THD, keys_CKD, values_CKD, table, scale, window)
    if group.pieces != 1:
        raise ValueError("chunks are attended to one at a time")
    cells_N = group.cells_BN[0]
    return attend_chunk(query_THD, keys_CKD[cells_N], values_CKD[cells_N], scale, window)


def attend_chunk(
    query_nHD: Tensor, keys_NKD: Tensor, values_NKD: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Attention of the last n of N tokens of one sequence, each to those up to itself, [n, H, D].

    With `window` to the last so many of them.
    """
    n, N = len(query_nHD), len(keys_NKD)
    mask: Any = causal_lower_right(n, N)
    if window is not None and window < N:
        position_n = torch.arange(N - n, N, device=query_nHD.device)[:, None]
        context_N = torch.arange(N, device=query_nHD.device)
        mask = (context_N <= position_n) & (context_N > position_n - window)
    groups = query_nHD.shape[1] // keys_NKD.shape[1]
    # The subclass that `causal_lower_right` gives takes no grouped heads, so keys are repeated.
    query_HnD, keys_HND, values_HND = (
        t.transpose(0, 1) if t is query_nHD else t.transpose(0, 1).repeat_interleave(groups, 0)
        for t in (query_nHD, keys_NKD, values_NKD)
    )
    out_1HnD = F.scaled_dot_product_attention(
        query_HnD[None], keys_HND[None], values_HND[None], attn_mask=mask, scale=scale
    )
    return out_1HnD[0].transpose(0, 1)


def attend_one(
    query_BHD: Tensor,
    keys_CKD: Tensor,
    values_CKD: Tensor,
    table: Table,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of single tokens, each to the whole context that the table gives it, [B, H, D].

    With `window` to the last so many tokens of it. Two launches, whose shapes depend on the table's alone.
    """
    B, H, D = query_BHD.shape
    K, M = keys_CKD.shape[1], table.pages_BM.shape[1]
    longest = M * table.page_size
    # A power of 2, as each number of parts is compiled anew.
    parts = triton.next_power_of_2(min(triton.cdiv(PROGRAMS, B * K), triton.cdiv(longest, LEAST_PART)))
    block_D = max(16, triton.next_power_of_2(D))
    query_BHD = query_BHD.contiguous()
    sums_BHID = torch.empty((B, H, parts, D), dtype=torch.float32, device=query_BHD.device)
    scales_BHI2 = torch.empty((B, H, parts, 2), dtype=torch.float32, device=query_BHD.device)
    _parts_of_contexts[(B, K, parts)](
        query_BHD, keys_CKD, values_CKD, table.pages_BM, table.length_B, sums_BHID, scales_BHI2,
        keys_CKD.stride(0), keys_CKD.stride(1), table.pages_BM.stride(0), table.pages_BM.stride(1),
        scale / math.log(2), 0 if window is None else window,
        H=H, K=K, D=D, PARTS=parts, PAGE_SIZE=table.page_size, WINDOW=window is not None,
        BLOCK_G=max(16, triton.next_power_of_2(H // K)), BLOCK_N=64, BLOCK_D=block_D,
        PRECISION=precision(query_BHD),
    )  # fmt: skip
    out_BHD = torch.empty_like(query_BHD)
    _joined[(B, H)](sums_BHID, scales_BHI2, out_BHD, D=D, PARTS=parts, BLOCK_I=parts, BLOCK_D=block_D)
    return out_BHD


@triton.jit
def _parts_of_contexts(
    query, keys, values, pages, length, sums, scales, cell_stride, head_stride, table_stride, page_stride,
    scale, window,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One token, one key head and its query heads, one part of the context.

    Sums are softmax's numerators; `scales` holds the largest logit, in powers of 2, and the denominator. A part
    without tokens leaves a denominator of 0 and its sum unwritten.
    """
    b, k, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.arange(0, BLOCK_G)
    h = k * (H // K) + heads
    c = tl.arange(0, BLOCK_D)
    all_of_it = tl.load(length + b).to(tl.int32)
    first = tl.maximum(all_of_it - window, 0) if WINDOW else 0
    size = tl.cdiv(tl.cdiv(all_of_it - first, PARTS), BLOCK_N) * BLOCK_N
    start = first + part * size
    end = tl.minimum(start + size, all_of_it)
    at = (b * H + h) * PARTS + part
    own = heads < H // K
    best_g = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    below_g = tl.zeros((BLOCK_G,), tl.float32)
    sums_gd = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    zeros_gn = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    if start < end:
        of_q = own[:, None] & (c < D)[None, :]
        query_gd = tl.load(query + (b * H + h)[:, None] * D + c[None, :], mask=of_q, other=0.0)
        for block in range(start, end, BLOCK_N):
            n = block + tl.arange(0, BLOCK_N)
            seen = n < end
            page_n = tl.load(pages + b * table_stride + n // PAGE_SIZE * page_stride, mask=seen, other=0)
            cell_n = page_n.to(tl.int64) * PAGE_SIZE + n % PAGE_SIZE
            of_kv = seen[:, None] & (c < D)[None, :]
            place = cell_n[:, None] * cell_stride + k * head_stride + c[None, :]
            key_nd = tl.load(keys + place, mask=of_kv, other=0.0)
            value_nd = tl.load(values + place, mask=of_kv, other=0.0)
            logit_gn = tl.where(
                seen[None, :], dot(query_gd, tl.trans(key_nd), zeros_gn, PRECISION) * scale, float("-inf")
            )
            better_g = tl.maximum(best_g, tl.max(logit_gn, 1))
            weight_gn = tl.exp2(logit_gn - better_g[:, None])
            shrink_g = tl.exp2(best_g - better_g)
            below_g = below_g * shrink_g + tl.sum(weight_gn, 1)
            sums_gd = dot(weight_gn.to(value_nd.dtype), value_nd, sums_gd * shrink_g[:, None], PRECISION)
            best_g = better_g
        tl.store(sums + at[:, None] * D + c[None, :], sums_gd, mask=of_q)
    tl.store(scales + at * 2, best_g, mask=own)
    tl.store(scales + at * 2 + 1, below_g, mask=own)


@triton.jit
def _joined(sums, scales, out, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token and query head: the parts brought to one scale, summed, divided."""
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    i = tl.arange(0, BLOCK_I)
    c = tl.arange(0, BLOCK_D)
    best_i = tl.load(scales + (at * PARTS + i) * 2, mask=i < PARTS, other=float("-inf"))
    below_i = tl.load(scales + (at * PARTS + i) * 2 + 1, mask=i < PARTS, other=0.0)
    # A part without tokens has no scale, and what its sum holds may be anything.
    used_i = below_i > 0
    scale_i = tl.where(used_i, tl.exp2(best_i - tl.max(best_i, 0)), 0.0)
    mask = used_i[:, None] & (c < D)[None, :]
    sums_id = tl.load(sums + (at * PARTS + i)[:, None] * D + c[None, :], mask=mask, other=0.0)
    out_d = tl.sum(sums_id * scale_i[:, None], 0) / tl.sum(below_i * scale_i, 0)
    tl.store(out + at * D + c, out_d.to(out.dtype.element_ty), mask=c < D)
