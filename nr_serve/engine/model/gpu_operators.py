"""Operators of a decoder layer on a GPU, in Triton: the work between two matrix products, each in one launch.

With transformers' own operators a layer takes about forty kernel launches, and in a step of few tokens each launch
costs as much as a product of a small layer. None of these operators waits for the host, and their compiled
variants do not depend on the step.

Shape suffixes: T tokens, H query heads, K key heads, D head size, C cells, d stream width, f FFN width.
"""

# Parameters of Triton functions are pointers, sizes and strides; type annotations would say nothing.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, unused-ignore"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight_d: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, [..., d] to [..., d] (Zhang and Sennrich, 2019)."""
    return _normed(x, None, weight_d, eps)[1]


def add_rms_norm(x: Tensor, y: Tensor, weight_d: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and the RMSNorm of that sum, each [..., d]."""
    return _normed(x, y, weight_d, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU of the first half of the last dimension times the second half, [..., 2f] to [..., f]."""
    gate_up = gate_up.contiguous()
    f, block = gate_up.shape[-1] // 2, 1024
    out = gate_up.new_empty((*gate_up.shape[:-1], f))
    _silu_mul[(out.numel() // f, triton.cdiv(f, block))](gate_up, out, f, BLOCK=block)
    return out


def rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys_CKD: Tensor,
    values_CKD: Tensor,
    cells_T: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Split a product [1, T, (H + 2K) D] into heads; returns queries [T, H, D], caches keys and values.

    Queries and keys are rotated by cos and sin, [1, T, D] (Su et al., 2021), after their RMSNorm over D, if any.
    """
    K, D = keys_CKD.shape[1:]
    qkv = qkv.contiguous()
    T, H = qkv.shape[1], qkv.shape[2] // D - 2 * K
    query_THD = qkv.new_empty((T, H, D))
    normed = q_norm is not None and k_norm is not None
    _rotate[(T, H + 2 * K)](
        qkv, cos.contiguous(), sin.contiguous(), query_THD, keys_CKD, values_CKD, cells_T,
        q_norm if normed else qkv, k_norm if normed else qkv, eps, keys_CKD.stride(0),
        H=H, K=K, D=D, NORMED=normed, BLOCK_D=triton.next_power_of_2(D), num_warps=1,
    )  # fmt: skip
    return query_THD


def _normed(x: Tensor, y: Tensor | None, weight_d: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    d, x = x.shape[-1], x.contiguous()
    out = torch.empty_like(x)
    added = x if y is None else torch.empty_like(x)
    _rms_norm[(x.numel() // d,)](
        x, x if y is None else y.contiguous(), weight_d, added, out, d, eps,
        ADDS=y is not None, BLOCK_D=triton.next_power_of_2(d), num_warps=8 if d > 2048 else 4,
    )  # fmt: skip
    return added, out


@triton.jit
def _scaled(x, weight, mean_of_squares, eps, dtype: tl.constexpr):
    """RMSNorm as transformers computes it: rounded to the stream's type before the weight is applied."""
    return (x * tl.rsqrt(mean_of_squares + eps)).to(dtype).to(tl.float32) * weight.to(tl.float32)


@triton.jit
def _rms_norm(x, y, weight, added, out, d, eps, ADDS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Each program: the sum, if ADDS, and the RMSNorm of one token."""
    c = tl.arange(0, BLOCK_D)
    at = tl.program_id(0).to(tl.int64) * d + c
    x_d = tl.load(x + at, mask=c < d, other=0.0)
    if ADDS:
        x_d = (x_d.to(tl.float32) + tl.load(y + at, mask=c < d, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(added + at, x_d, mask=c < d)
    x_d = x_d.to(tl.float32)
    weight_d = tl.load(weight + c, mask=c < d, other=0.0)
    normed_d = _scaled(x_d, weight_d, tl.sum(x_d * x_d, 0) / d, eps, x.dtype.element_ty)
    tl.store(out + at, normed_d.to(out.dtype.element_ty), mask=c < d)


@triton.jit
def _silu_mul(gate_up, out, f, BLOCK: tl.constexpr):
    """Each program: a block of columns of one token."""
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t = tl.program_id(0).to(tl.int64)
    gate_c = tl.load(gate_up + t * 2 * f + c, mask=c < f, other=0.0).to(tl.float32)
    up_c = tl.load(gate_up + t * 2 * f + f + c, mask=c < f, other=0.0).to(tl.float32)
    tl.store(out + t * f + c, (gate_c / (1.0 + tl.exp(-gate_c)) * up_c).to(out.dtype.element_ty), mask=c < f)


@triton.jit
def _rotate(
    qkv, cos, sin, query, keys, values, cells, q_norm, k_norm, eps, cell_stride,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, NORMED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each program: one head of one token, numbered query heads first, then key heads, then value heads."""
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK_D)
    there = c < D
    own = qkv + (t * (H + 2 * K) + head) * D
    x_c = tl.load(own + c, mask=there, other=0.0)
    cell = tl.load(cells + t).to(tl.int64)
    if head >= H + K:
        tl.store(values + cell * cell_stride + (head - H - K) * D + c, x_c, mask=there)
        return
    other_c = (c + D // 2) % D  # the other element of each rotated pair
    x_c, pair_c = x_c.to(tl.float32), tl.load(own + other_c, mask=there, other=0.0).to(tl.float32)
    if NORMED:
        weight = q_norm
        if head >= H:
            weight = k_norm
        mean = tl.sum(x_c * x_c, 0) / D
        kind: tl.constexpr = qkv.dtype.element_ty
        pair_c = _scaled(pair_c, tl.load(weight + other_c, mask=there, other=0.0), mean, eps, kind)
        x_c = _scaled(x_c, tl.load(weight + c, mask=there, other=0.0), mean, eps, kind)
    cos_c = tl.load(cos + t * D + c, mask=there, other=0.0).to(tl.float32)
    sin_c = tl.load(sin + t * D + c, mask=there, other=0.0).to(tl.float32)
    turned_c = (x_c * cos_c + tl.where(c < D // 2, -pair_c, pair_c) * sin_c).to(qkv.dtype.element_ty)
    if head >= H:
        tl.store(keys + cell * cell_stride + (head - H) * D + c, turned_c, mask=there)
    else:
        tl.store(query + (t * H + head) * D + c, turned_c, mask=there)
