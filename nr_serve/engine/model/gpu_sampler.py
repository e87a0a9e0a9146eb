"""Sampling on a GPU: the next tokens of all requests of a step are drawn at once, and read at once.

Truncates as `sampler.py` does, but draws by noise, where that takes one number. Both depend only on a request's
seed and on the position in its answer.
Shape suffixes: N rows of logits, n rows to draw from, c rows that top_k or top_p truncate, V vocabulary.
"""

# Parameters of Triton functions are pointers, sizes and strides; type annotations would say nothing.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, unused-ignore"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from nr_serve.engine.model.device import copying, placed
from nr_serve.engine.model.results import Outcome
from nr_serve.engine.model.sampler import GREEDY, adjust, allow, likeliest
from nr_serve.engine.request import Request

log = logging.getLogger(__name__)
_NUMBERS_AT_ONCE = 2**22
"""Logits drawn from in one batch: sorting takes ten times their memory."""


def draw(logits_NV: Tensor, request_of: Mapping[int, Request]) -> tuple[list[int], Tensor]:
    """Draw the next token for each row's request. Returns the rows, and their tokens, int64 [n].

    A row whose logits cannot be prepared is left out, for example if its guide fails.
    """
    ready = {}
    for row, request in request_of.items():
        try:
            ready[row] = adjust(allow(logits_NV[row], request.progress), request)
        except Exception as error:  # noqa: BLE001 - without a token the request fails, and that is reported
            log.debug("row %d is not drawn with the others: %r", row, error)
    rows = list(ready)
    most = max(1, _NUMBERS_AT_ONCE // logits_NV.shape[-1])
    tokens = [
        _draw(torch.stack([ready[row] for row in part]), [request_of[row] for row in part])
        for part in (rows[i : i + most] for i in range(0, len(rows), most))
    ]
    return rows, torch.cat(tokens) if tokens else logits_NV.new_empty(0, dtype=torch.int64)


def outcome(
    logits_NV: Tensor, asking: Mapping[int, Request], open_TS: Tensor | None, selected_TS: Tensor
) -> Callable[[], Outcome]:
    """Draw, and start to copy a step's outcome to the host. Returns what waits for it once and gives it."""
    rows, drawn_n = draw(logits_NV, asking)
    opened = [] if open_TS is None else [open_TS]
    copied = copying(likeliest(logits_NV), drawn_n, selected_TS, *opened)

    def wait() -> Outcome:
        likeliest_N, drawn_n, selected_TS, *opened = copied()
        drawn = dict(zip(rows, drawn_n.tolist(), strict=True))
        return Outcome(likeliest_N.tolist(), drawn, opened[0] if opened else None, selected_TS)

    return wait


def _draw(weights_nV: Tensor, requests: list[Request]) -> Tensor:
    """One token for each row of adjusted logits, int64 [n]."""
    n, V = weights_nV.shape
    samplings = [request.sampling for request in requests]
    hot = [sampling.temperature >= GREEDY for sampling in samplings]
    cut = [i for i, s in enumerate(samplings) if hot[i] and (0 < s.top_k < V or s.top_p < 1)]
    kept = [samplings[i].top_k for i in cut]
    seed_n, place_n, heat_n1, hot_n1, least_n1, cut_c, k_c1, p_c1 = placed(
        [
            np.array([request.seed % 2**64 for request in requests], np.uint64).view(np.int64),
            np.array([request.generated for request in requests], np.int64),
            np.array([[s.temperature if h else 1.0] for s, h in zip(samplings, hot, strict=True)], np.float32),
            np.array([[h] for h in hot]),
            np.array([[math.log(s.min_p) if s.min_p > 0 else -math.inf] for s in samplings], np.float32),
            np.array(cut, np.int64),
            np.array([[k - 1 if 0 < k < V else V - 1] for k in kept], np.int64).reshape(-1, 1),
            np.array([[samplings[i].top_p] for i in cut], np.float64).reshape(-1, 1),
        ],
        weights_nV.device,
    )
    heated_nV = weights_nV / heat_n1
    if cut:
        of_cut_cV = heated_nV.index_select(0, cut_c)
        lowest_c1 = _lowest(of_cut_cV, k_c1, p_c1)
        heated_nV.index_copy_(0, cut_c, of_cut_cV.masked_fill(of_cut_cV < lowest_c1, -torch.inf))
    if any(sampling.min_p > 0 for sampling in samplings):
        # A probability is below min_p times the highest if its logit is far enough below the highest logit.
        heated_nV.masked_fill_(heated_nV < heated_nV.amax(-1, keepdim=True) + least_n1, -torch.inf)
    noise_nV = torch.empty((n, V), dtype=torch.float32, device=weights_nV.device)
    block = 1024
    _exponential[(n, triton.cdiv(V, block))](seed_n, place_n, noise_nV, V, BLOCK=block)
    # argmax(p / e) with exponential noise e draws from p (the Gumbel trick).
    drawn_nV = heated_nV.softmax(-1).div_(noise_nV)
    return torch.where(hot_n1, drawn_nV, weights_nV).argmax(-1)


def _lowest(logits_cV: Tensor, k_c1: Tensor, p_c1: Tensor) -> Tensor:
    """The lowest logit that top_k and then top_p keep, [c, 1]. `k_c1` is top_k - 1, the rank of the last kept."""
    ordered_cV = logits_cV.sort(-1, descending=True).values
    kth_c1 = ordered_cV.gather(-1, k_c1)
    probabilities_cV = ordered_cV.masked_fill(ordered_cV < kth_c1, -torch.inf).softmax(-1)
    before_cV = probabilities_cV.cumsum(-1, dtype=torch.float64) - probabilities_cV
    count_c1 = (before_cV < p_c1).sum(-1, keepdim=True).clamp(min=1)
    # With a top_p of 1, rounding errors must not drop the rarest token.
    return torch.where(p_c1 < 1, torch.maximum(ordered_cV.gather(-1, count_c1 - 1), kth_c1), kth_c1)


@triton.jit
def _exponential(seeds, places, noise, V, BLOCK: tl.constexpr):
    """Exponential noise for a block of a row's tokens; depends only on the seed, the position and the token id."""
    row = tl.program_id(0)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    nothing = v * 0
    place = tl.load(places + row).to(tl.int32) + nothing
    bits, _, _, _ = tl.philox(tl.load(seeds + row), v, place, nothing, nothing)
    # Strictly between 0 and 1, in float64: noise of 0 would choose its token whatever the logits.
    uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    tl.store(noise + row.to(tl.int64) * V + v, (-tl.log(uniform)).to(tl.float32), mask=v < V)
