"""The bank's step on a GPU, in Triton: what `math.py` defines, for all slots of one layer at once.

There are four functions, called in this order. None synchronises with the host, so a CUDA graph can hold them;
shapes and grids depend only on the step's size. The device decides what is computed: programs of a grid that find
no open gate end at once, so where every gate is shut no block's weight is read. Triton compiles a kernel again for
each block size, and for integers that are 1 or divisible by 16. So there are few block sizes, and kernels are not
specialised on what changes from step to step: a short warm-up meets every variant.

    gates     logits, carry, threshold, selection, statistics, carried state           2 launches
    compact   for each slot, the tokens whose gate fired, laid end to end              1 launch
    hidden    u = g silu(W_gate x) * (W_in x) of those tokens                          1 launch
    add       y += W_out u, one slot after another, so that sums are reproducible      1 launch

Sums are float32.
Shape suffixes: T tokens of a step, P pieces, S slots, R rows, N pages, H width of a slot (h of a block), d width
of the stream, K parts of d.
"""

# Parameters of Triton functions are pointers, sizes and strides; type annotations would say nothing.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, unused-ignore"
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nr_serve.errors import NrError

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise NrError("the GPU kernels need triton, of the extra `gpu`") from missing

PARTS_OF_D = 32
"""The gates' products are split along d into at most this many parts: few tokens then still occupy the device."""
FEW, MANY, MOST = 16, 64, 1024
"""Steps with more tokens than each of these use other kernel variants; so do pieces of over 1 and `MANY` tokens."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """What the gates must know about a step's tokens. Integer tensors on the device; see `step.StepTokens`."""

    first_P: Tensor
    """Index of each piece's first token."""
    last_P: Tensor
    """Index of each piece's last token."""
    row_T: Tensor
    """State row of the token's request."""
    selected_TS: Tensor
    """Bool, contiguous: whether the slot may act on the token."""
    page_T: Tensor
    """The page that the token ends, if its carried state must be kept; -1 for none."""
    longest: int
    """Number of tokens in the longest piece, or an upper bound."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One layer's gates, for all slots, with the states carried from token to token and step to step.

    All float32 except the two counters; every tensor after `ceiling_S` is written to.
    """

    w_Sd: Tensor
    b_S: Tensor
    carry_S: Tensor
    threshold_S: Tensor
    ceiling_S: Tensor
    state_RS: Tensor
    """m of each row's last token; NaN: the sequence starts here."""
    page_state_NS: Tensor
    """m at the end of each page."""
    open_TS: Tensor
    """int32, contiguous; increased by 1 where the gate is open, selected or not."""
    fired_S: Tensor
    """int64; increased by the number of tokens on which a selected gate fired."""
    mass_S: Tensor
    """float64; increased by the sum of the finite gates."""


@dataclass(frozen=True, slots=True)
class Fired:
    """The tokens that fired, by slot."""

    token_ST: Tensor
    """int32; the first `count_S` entries of a row are the tokens that fired, in order; the rest are undefined."""
    place_ST: Tensor
    """int32; index of each token in its row of `token_ST`, -1 where the gate is shut."""
    count_S: Tensor
    """int32; number of tokens that fired."""


def gates(x_Td: Tensor, gate: Gate, pieces: Pieces, *, counts: bool = True) -> Tensor:
    """Block gates g of every slot, float32 [T, S], 0 where not selected; updates the states and the statistics.

    As `math.gate_logit`, `math.carry` and `math.block_gate`, except that relu(m - threshold) is 0 unless
    m > threshold, so that a NaN is shut. Without `counts` the statistics of fired gates are not changed.
    """
    T, d = x_Td.shape
    S, many = gate.b_S.numel(), T > MOST
    block_S, block_d = _block(S, most=32), 128
    # With many tokens there are enough programs already, and one program sums all parts of a piece.
    most_parts = 1 if many else max(1, PARTS_OF_D // triton.cdiv(S, block_S))
    part_size = block_d * triton.cdiv(triton.cdiv(d, block_d), most_parts)  # whole blocks, for aligned loads
    parts = triton.cdiv(d, part_size)
    block_T = _block_of(T)
    z_KTS = x_Td.new_empty((parts, T, S), dtype=torch.float32)
    g_TS = torch.empty_like(z_KTS[0])
    _logits[(triton.cdiv(T, block_T), triton.cdiv(S, block_S), parts)](
        x_Td, gate.w_Sd, z_KTS, T, d, S, x_Td.stride(0), gate.w_Sd.stride(0), part_size,
        BLOCK_T=block_T, BLOCK_S=block_S, BLOCK_D=block_d,
    )  # fmt: skip
    block_t = 256 if many or pieces.longest > MANY else 1 if pieces.longest == 1 else MANY
    _carry[(pieces.first_P.numel(), triton.cdiv(S, block_S))](
        z_KTS, gate.b_S, gate.carry_S, gate.threshold_S, gate.ceiling_S, pieces.first_P, pieces.last_P,
        pieces.row_T, pieces.page_T, pieces.selected_TS,
        gate.state_RS, gate.page_state_NS, gate.open_TS, gate.fired_S, gate.mass_S, g_TS,
        T, S, gate.state_RS.stride(0), gate.page_state_NS.stride(0), int(counts),
        PARTS=parts, BLOCK_T=block_t, BLOCK_S=block_S,
    )  # fmt: skip
    return g_TS


def compact(g_TS: Tensor) -> Fired:
    """The tokens that fired, by slot."""
    T, S = g_TS.shape
    token_ST = torch.empty((S, T), dtype=torch.int32, device=g_TS.device)
    fired = Fired(token_ST, torch.empty_like(token_ST), torch.empty_like(token_ST[:, 0]))
    _compact[(S,)](g_TS, fired.token_ST, fired.place_ST, fired.count_S, T, S, BLOCK_T=MANY if T <= MANY else 1024)
    return fired


def hidden(x_Td: Tensor, g_TS: Tensor, fired: Fired, w_up_Sud: Tensor, width_S: Tensor) -> Tensor:
    """u = g silu(W_gate x) * (W_in x) in x's dtype, [S, T, H]; row n of slot s is the n-th token that fired on s.

    `width_S`, int32: the width h of each slot's block in this layer. `w_up_Sud`: each block's h rows of W_in, then
    its h rows of W_gate, in a slot of 2H rows. u is undefined beyond `fired.count_S` tokens and `width_S` columns.
    """
    T, d = x_Td.shape
    S, H = len(w_up_Sud), w_up_Sud.shape[1] // 2
    u_STH = x_Td.new_empty((S, T, H))
    block_T = _block_of(T)
    block_H = 16 if T <= MANY else 64
    _hidden[(triton.cdiv(H, block_H), triton.cdiv(T, block_T), S)](
        x_Td, g_TS, fired.token_ST, fired.count_S, w_up_Sud, width_S, u_STH,
        T, d, S, H, x_Td.stride(0), w_up_Sud.stride(0), w_up_Sud.stride(1),
        BLOCK_T=block_T, BLOCK_H=block_H, BLOCK_D=128 if T <= MANY else 64, PRECISION=precision(x_Td),
    )  # fmt: skip
    return u_STH


def add(y_Td: Tensor, u_STH: Tensor, fired: Fired, w_out_SHd: Tensor, width_S: Tensor) -> None:
    """Add W_out u of every slot to y, in place; rows of y on which nothing fired keep every bit.

    `w_out_SHd` is transposed, as in the bank.
    """
    T, d = y_Td.shape
    S, _, H = u_STH.shape
    block_T = _block_of(T)
    block_d = 32 if T <= MANY else 64
    _add[(triton.cdiv(d, block_d), triton.cdiv(T, block_T))](
        y_Td, u_STH, fired.place_ST, w_out_SHd, width_S,
        T, d, S, H, y_Td.stride(0), w_out_SHd.stride(0), w_out_SHd.stride(1),
        BLOCK_T=block_T, BLOCK_H=128 if T <= MANY else 64, BLOCK_D=block_d, BLOCK_S=triton.next_power_of_2(S),
        PRECISION=precision(y_Td),
        num_stages=4 if T <= MANY else 3,  # few programs: each must prefetch much of its weights
    )  # fmt: skip


def _block(size: int, most: int) -> int:
    """A power of two, at least 16, which is the least that Triton's matrix product takes, and at most `most`."""
    return min(most, max(16, int(triton.next_power_of_2(size))))


def _block_of(tokens: int) -> int:
    """Number of tokens per program of a product, in a step of `tokens` tokens."""
    return FEW if tokens <= FEW else MANY


def precision(x: Tensor) -> str:
    """`dot`'s precision: float32 for float32 (Triton's default would be TF32), tensor cores for narrower types.

    On a CPU there is only Triton's interpreter, which cannot multiply bfloat16, so that is float32 too.
    """
    return "ieee" if x.dtype == torch.float32 or x.device.type == "cpu" else "tf32"


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b, summed in float32."""
    if PRECISION == "ieee":
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T"])
def _logits(
    x, w, z, T, d, S, x_stride, w_stride, part_size,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each program: z_KTS for one part of d, without the bias."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    part = tl.program_id(2)
    end = tl.minimum(d, (part + 1) * part_size)
    total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for start in range(part * part_size, end, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)
        of_x = (t < T)[:, None] & (c < end)[None, :]
        of_w = (c < end)[:, None] & (s < S)[None, :]
        x_tc = tl.load(x + t.to(tl.int64)[:, None] * x_stride + c[None, :], mask=of_x, other=0.0)
        w_cs = tl.load(w + s[None, :] * w_stride + c[:, None], mask=of_w, other=0.0)
        # A gate's threshold lies close to the logits: bfloat16 or TF32 would be too coarse.
        total = dot(x_tc, w_cs, total, "ieee")
    at = (part.to(tl.int64) * T + t[:, None]) * S + s[None, :]
    tl.store(z + at, total, mask=(t < T)[:, None] & (s < S)[None, :])


@triton.jit
def _then(a_first, b_first, a_next, b_next):
    """Compose m -> a_first m + b_first with m -> a_next m + b_next; returns the two coefficients."""
    return a_first * a_next, b_first * a_next + b_next


@triton.jit(do_not_specialize=["T", "counts"])
def _carry(
    z, b, a, threshold, ceiling, first, last, row, page, selected, state, page_state, opened, fired, mass, g,
    T, S, state_stride, page_state_stride, counts,
    PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Each program: one piece and some slots; m in blocks of BLOCK_T tokens, and what follows from m."""
    piece = tl.program_id(0)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    there = s < S
    start, end = tl.load(first + piece).to(tl.int32), tl.load(last + piece).to(tl.int32) + 1
    own_row = tl.load(row + start).to(tl.int64)
    b_s = tl.load(b + s, mask=there, other=0.0)
    a_s = tl.load(a + s, mask=there, other=0.0)
    threshold_s = tl.load(threshold + s, mask=there, other=float("inf"))
    ceiling_s = tl.load(ceiling + s, mask=there, other=0.0)
    m_s = tl.load(state + own_row * state_stride + s, mask=there, other=0.0)
    fresh_s = m_s != m_s  # NaN: the sequence starts here
    m_s = tl.where(fresh_s, 0.0, m_s)
    fired_s = tl.zeros((BLOCK_S,), tl.int64)
    mass_s = tl.zeros((BLOCK_S,), tl.float64)
    for block in range(start, end, BLOCK_T):
        t = block + tl.arange(0, BLOCK_T)
        inside = (t < end)[:, None] & there[None, :]
        at = t.to(tl.int64)[:, None] * S + s[None, :]
        z_ts = tl.zeros((BLOCK_T, BLOCK_S), tl.float32) + b_s[None, :]
        for part in tl.static_range(PARTS):
            z_ts += tl.load(z + part * T * S + at, mask=inside, other=0.0)
        keep_ts = tl.zeros((BLOCK_T, BLOCK_S), tl.float32) + a_s[None, :]
        starts = (t == start)[:, None] & fresh_s[None, :]
        take_ts = tl.where(starts, 0.0, (1.0 - a_s)[None, :] * z_ts)
        keep_ts, take_ts = tl.associative_scan((keep_ts, take_ts), 0, _then)
        m_ts = keep_ts * m_s[None, :] + take_ts
        final = (t == tl.minimum(end, block + BLOCK_T) - 1)[:, None]
        m_s = tl.sum(tl.where(final, m_ts, 0.0), 0)

        is_open = inside & (m_ts > threshold_s[None, :])
        tl.store(opened + at, tl.load(opened + at, mask=inside, other=0) + is_open.to(tl.int32), mask=inside)
        acts = is_open & (tl.load(selected + at, mask=inside, other=0) != 0)
        # `where`, not a product: the threshold of a detached slot is infinite.
        g_ts = tl.where(acts, tl.minimum(m_ts - threshold_s[None, :], ceiling_s[None, :]), 0.0)
        tl.store(g + at, g_ts, mask=inside)
        fired_s += tl.sum(acts.to(tl.int64), 0)
        mass_s += tl.sum(tl.where(g_ts < float("inf"), g_ts, 0.0).to(tl.float64), 0)
        page_t = tl.load(page + t, mask=t < end, other=-1).to(tl.int64)
        ends_page = (page_t >= 0)[:, None] & there[None, :]
        tl.store(page_state + page_t[:, None] * page_state_stride + s[None, :], m_ts, mask=ends_page)
    tl.store(state + own_row * state_stride + s, m_s, mask=there)
    fired_s *= counts
    tl.atomic_add(fired + s, fired_s, mask=there & (fired_s > 0))
    tl.atomic_add(mass + s, mass_s, mask=there & (fired_s > 0))


@triton.jit(do_not_specialize=["T"])
def _compact(g, token, place, count, T, S, BLOCK_T: tl.constexpr):
    """Each program: one slot's fired tokens, in order."""
    s = tl.program_id(0)
    before = tl.sum(tl.zeros((BLOCK_T,), tl.int32), 0)
    for block in range(0, T, BLOCK_T):
        t = block + tl.arange(0, BLOCK_T)
        acts = tl.load(g + t.to(tl.int64) * S + s, mask=t < T, other=0.0) > 0
        at = before + tl.cumsum(acts.to(tl.int32), 0) - 1
        tl.store(place + s * T + t, tl.where(acts, at, -1), mask=t < T)
        tl.store(token + s * T + at, t, mask=acts)
        before += tl.sum(acts.to(tl.int32), 0)
    tl.store(count + s, before)


@triton.jit(do_not_specialize=["T"])
def _hidden(
    x, g, token, count, w_up, width, u, T, d, S, H, x_stride, w_slot, w_stride,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program: some fired tokens of a slot, and some rows of its block."""
    s = tl.program_id(2)
    n = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    fired, h_end = tl.load(count + s), tl.load(width + s)
    if (tl.program_id(1) * BLOCK_T >= fired) | (tl.program_id(0) * BLOCK_H >= h_end):
        return
    slot = s.to(tl.int64)
    t = tl.load(token + slot * T + n, mask=n < fired, other=0).to(tl.int64)
    of_in = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    of_gate = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for start in range(0, d, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)
        of_x = (n < fired)[:, None] & (c < d)[None, :]
        of_w = (c < d)[:, None] & (h < h_end)[None, :]
        x_nc = tl.load(x + t[:, None] * x_stride + c[None, :], mask=of_x, other=0.0)
        w_ch = w_up + slot * w_slot + h[None, :] * w_stride + c[:, None]
        in_ch = tl.load(w_ch, mask=of_w, other=0.0)
        gate_ch = tl.load(w_ch + h_end * w_stride, mask=of_w, other=0.0)
        of_in = dot(x_nc, in_ch, of_in, PRECISION)
        of_gate = dot(x_nc, gate_ch, of_gate, PRECISION)
    g_n = tl.load(g + t * S + s, mask=n < fired, other=0.0)
    u_nh = g_n[:, None] * (of_gate / (1.0 + tl.exp(-of_gate))) * of_in
    at = (slot * T + n[:, None]) * H + h[None, :]
    tl.store(u + at, u_nh.to(u.dtype.element_ty), mask=(n < fired)[:, None] & (h < h_end)[None, :])


@triton.jit(do_not_specialize=["T"])
def _add(
    y, u, place, w_out, width, T, d, S, H, y_stride, w_slot, w_stride,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program: what all slots add to some tokens and some columns of y."""
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    slots = tl.arange(0, BLOCK_S)
    every = slots.to(tl.int64)[:, None] * T + t[None, :]
    place_st = tl.load(place + every, mask=(slots < S)[:, None] & (t < T)[None, :], other=-1)
    acts_t = tl.max(place_st, 0) >= 0
    acts_s = tl.max(place_st, 1) >= 0
    if tl.max(place_st) < 0:
        return
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for s in range(0, S):
        if tl.sum(tl.where(slots == s, acts_s.to(tl.int32), 0), 0) > 0:
            slot = tl.full((), 0, tl.int64) + s
            n = tl.load(place + slot * T + t, mask=t < T, other=-1)
            h_end = tl.load(width + s)
            for start in range(0, h_end, BLOCK_H):
                h = start + tl.arange(0, BLOCK_H)
                of_u = (n >= 0)[:, None] & (h < h_end)[None, :]
                of_w = (h < h_end)[:, None] & (c < d)[None, :]
                u_th = tl.load(u + (slot * T + n[:, None]) * H + h[None, :], mask=of_u, other=0.0)
                w_hc = tl.load(w_out + slot * w_slot + h[:, None] * w_stride + c[None, :], mask=of_w, other=0.0)
                total = dot(u_th, w_hc, total, PRECISION)
    at = y + t.to(tl.int64)[:, None] * y_stride + c[None, :]
    mask = acts_t[:, None] & (c < d)[None, :]
    tl.store(at, (tl.load(at, mask=mask, other=0.0).to(tl.float32) + total).to(y.dtype.element_ty), mask=mask)
