"""Paged attention on a GPU: what `KVCache.attend` is there.

Single tokens read their context in place, through a page table, by a Triton kernel that splits long contexts into
parts. It never waits for the host, so it can be part of a CUDA graph. For a prompt's chunk the context is gathered
once per layer, which costs little beside the layer's own products, and passed to torch's SDPA.

Shape suffixes: as in `attention`; B single tokens, M pages of the longest context, I parts of a context.
"""

# Parameters of Triton functions are pointers, sizes and strides; type annotations would say nothing.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, unused-ignore"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nr_serve.engine.model.batch import Batch, PagedGroup, Table
from nr_serve.engine.model.graphs import DecodeBatch
from nr_serve.neutral.kernels import dot, precision

PROGRAMS = 512
"""Contexts are split into parts until there are this many programs, or the parts are LEAST_PART long."""
LEAST_PART = 256
"""Fewest tokens of a context that are worth a program of their own."""


def attend(
    query_THD: Tensor,
    keys_CKD: Tensor,
    values_CKD: Tensor,
    batch: Batch | DecodeBatch,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of a step over a layer's keys and values, like `attention.attend_on_cpu`; [T, H, D]."""
    if isinstance(batch, DecodeBatch):
        return attend_one(query_THD, keys_CKD, values_CKD, batch.table, scale, window)
    outputs = [_attend(query_THD, keys_CKD, values_CKD, group, scale, window) for group in batch.paged]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(
    query_THD: Tensor, keys_CKD: Tensor, values_CKD: Tensor, group: PagedGroup, scale: float, window: int | None
) -> Tensor:
    """One group's attention, [B * n, H, D]."""
    query_THD = query_THD[group.first : group.first + group.pieces * group.count]
    if group.count == 1:
        return attend_one(query_THD, keys_CKD, values_CKD, group.table, scale, window)
    keys_NKD, values_NKD = (_gathered(cache, group) for cache in (keys_CKD, values_CKD))
    return attend_chunk(query_THD, keys_NKD, values_NKD, scale, window)


def _gathered(cache_CKD: Tensor, group: PagedGroup) -> Tensor:
    """The context of a group with one piece, [N, K, D], gathered page by page."""
    page_size = group.table.page_size
    C = len(cache_CKD) // page_size * page_size  # the spare cell is in no page
    pages = cache_CKD[:C].view(-1, page_size * cache_CKD[0].numel())
    return pages.index_select(0, group.table.pages_BM[0]).view(-1, *cache_CKD.shape[1:])[: group.longest]


def attend_chunk(
    query_nHD: Tensor, keys_NKD: Tensor, values_NKD: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of the last n of one sequence's N tokens, [n, H, D].

    With `window`, each token attends only to its last `window` positions.
    """
    n, N = len(query_nHD), len(keys_NKD)
    mask: Any = causal_lower_right(n, N)
    # Flash attention supports grouped heads. With a mask or in float32 torch uses other kernels: keys are
    # repeated.
    grouped = query_nHD.dtype != torch.float32
    if window is not None and window < N:
        position_n = torch.arange(N - n, N, device=query_nHD.device)[:, None]
        context_N = torch.arange(N, device=query_nHD.device)
        mask = (context_N <= position_n) & (context_N > position_n - window)
        grouped = False
    query_HnD, keys_HND, values_HND = (t.transpose(0, 1) for t in (query_nHD, keys_NKD, values_NKD))
    if not grouped:
        repeats = query_nHD.shape[1] // keys_NKD.shape[1]
        keys_HND, values_HND = (t.repeat_interleave(repeats, 0) for t in (keys_HND, values_HND))
    out_1HnD = F.scaled_dot_product_attention(
        query_HnD[None], keys_HND[None], values_HND[None], attn_mask=mask, scale=scale, enable_gqa=grouped
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
    """Attention of single tokens, each to its whole context in the table, [B, H, D].

    With `window`, only to the last `window` tokens. Two kernel launches, whose shapes depend only on the table's.
    """
    B, H, D = query_BHD.shape
    K, M = keys_CKD.shape[1], table.pages_BM.shape[1]
    longest = M * table.page_size
    parts = max(1, min(triton.cdiv(PROGRAMS, B * K), triton.cdiv(longest, LEAST_PART)))
    block_D = max(16, triton.next_power_of_2(D))
    block_N = 64 if block_D * keys_CKD.itemsize <= 512 else 32  # what fits a program with three pipeline stages
    query_BHD = query_BHD.contiguous()
    sums_BHID = torch.empty((B, H, parts, D), dtype=torch.float32, device=query_BHD.device)
    scales_BHI2 = torch.empty((B, H, parts, 2), dtype=torch.float32, device=query_BHD.device)
    _parts_of_contexts[(B, K, parts)](
        query_BHD, keys_CKD, values_CKD, table.pages_BM, table.length_B, sums_BHID, scales_BHI2,
        keys_CKD.stride(0), keys_CKD.stride(1), table.pages_BM.stride(0), table.pages_BM.stride(1),
        scale / math.log(2), 0 if window is None else window,
        H=H, K=K, D=D, PAGE_SIZE=table.page_size, WINDOW=window is not None,
        BLOCK_G=max(16, triton.next_power_of_2(H // K)), BLOCK_N=block_N, BLOCK_D=block_D,
        PRECISION=precision(query_BHD),
    )  # fmt: skip
    out_BHD = torch.empty_like(query_BHD)
    _joined[(B, H)](sums_BHID, scales_BHI2, out_BHD, parts, D=D, BLOCK_I=16, BLOCK_D=block_D)
    return out_BHD


# Not specialised on values that change with the step: compiling each variant would hold up every request.
@triton.jit(do_not_specialize=["table_stride", "page_stride"], do_not_specialize_on_alignment=["pages", "length"])
def _parts_of_contexts(
    query, keys, values, pages, length, sums, scales, cell_stride, head_stride, table_stride, page_stride,
    scale, window,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program: one token, one key head with its query heads, one part of the context.

    `sums` are the numerators of the softmax; `scales` holds the largest logit, in powers of 2, and the
    denominator. A part without tokens stores a denominator of 0 and leaves its `sums` unwritten.
    """
    b, k, part, parts = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    heads = tl.arange(0, BLOCK_G)
    h = k * (H // K) + heads
    c = tl.arange(0, BLOCK_D)
    all_of_it = tl.load(length + b).to(tl.int32)
    first = tl.maximum(all_of_it - window, 0) if WINDOW else 0
    size = tl.cdiv(tl.cdiv(all_of_it - first, parts), BLOCK_N) * BLOCK_N
    start = first + part * size
    end = tl.minimum(start + size, all_of_it)
    at = (b * H + h) * parts + part
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


@triton.jit(do_not_specialize=["parts"])
def _joined(sums, scales, out, parts, D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr):
    """Each program: one token and query head. Rescales the parts to one maximum, adds them up and divides."""
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    c = tl.arange(0, BLOCK_D)
    best = tl.full((), float("-inf"), tl.float32)
    below = tl.full((), 0.0, tl.float32)
    sum_d = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, parts, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        below_i = tl.load(scales + (at * parts + i) * 2 + 1, mask=i < parts, other=0.0)
        # A part without tokens has no scale, and its sum may hold anything, so it is skipped. The first part
        # always has tokens. A NaN denominator is not skipped, so that it shows in the result.
        used_i = below_i != 0.0
        best_i = tl.load(scales + (at * parts + i) * 2, mask=used_i, other=float("-inf"))
        better = tl.maximum(best, tl.max(best_i, 0))
        scale_i = tl.where(used_i, tl.exp2(best_i - better), 0.0)
        shrink = tl.exp2(best - better)
        mask = used_i[:, None] & (c < D)[None, :]
        sums_id = tl.load(sums + (at * parts + i)[:, None] * D + c[None, :], mask=mask, other=0.0)
        sum_d = sum_d * shrink + tl.sum(sums_id * scale_i[:, None], 0)
        below = below * shrink + tl.sum(below_i * scale_i, 0)
        best = better
    tl.store(out + at * D + c, (sum_d / below).to(out.dtype.element_ty), mask=c < D)
