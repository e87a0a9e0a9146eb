"""From logits to tokens. Every request is sampled on its own, by a number that depends on its seed and place alone.

`sample` is for logits on a CPU; `gpu_sampler` is its counterpart. On a CPU with compiled operators, theirs takes
the place of `likeliest`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nr_serve.engine.guide import Progress
from nr_serve.engine.messages import Sampling
from nr_serve.engine.model.device import placed, read
from nr_serve.engine.request import Request, TopLogprobs

GREEDY = 1e-5
"""Temperatures below this choose the likeliest token: dividing by them would overflow."""
NOT_A_NUMBER = -1
"""In a token's place, where logits are NaN."""
_SUMMED = 256
"""Weights whose sum is looked at before themselves: quicker than one by one."""


def allow(logits_V: Tensor, progress: Progress | None) -> Tensor:
    """Logits with -inf for the tokens that a guide does not allow next; log probabilities are taken of these."""
    if progress is None:
        return logits_V
    (allowed_V,) = placed([allowed(progress, logits_V.shape[-1]).numpy()], logits_V.device)
    return logits_V.masked_fill(~allowed_V, -torch.inf)


def allowed(progress: Progress, vocab_size: int) -> Tensor:
    """Which tokens may come next, bool [vocab_size]."""
    bytes_B = torch.frombuffer(bytearray(progress.allowed_bits()), dtype=torch.uint8)
    bits_B8 = bytes_B[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits_B8.flatten()[:vocab_size].bool()


def likeliest(logits_NV: Tensor) -> Tensor:
    """Each row's likeliest token, int64 [N], the first one if several are equal; NOT_A_NUMBER if the row has a NaN.

    Does not wait for a device.
    """
    best_N, token_N = logits_NV.max(-1)
    return token_N.masked_fill(best_N.isnan(), NOT_A_NUMBER)


def takes_likeliest(request: Request) -> bool:
    """Whether `sample` would choose the likeliest token of the model's unchanged logits."""
    return request.sampling.temperature < GREEDY and request.progress is None and not _adjusts(request)


def sample(logits_V: Tensor, request: Request) -> int:
    """The next token of one request, from the model's logits for it (float32 [V], not modified)."""
    adjusted_V = adjust(logits_V, request).numpy()
    if request.sampling.temperature < GREEDY:
        return int(adjusted_V.argmax())
    # Each token has its own generator, seeded by the request's seed and the position in its answer: the draw
    # depends neither on the batch nor on preemption.
    generator = np.random.Generator(np.random.PCG64([request.seed % 2**64, request.generated]))
    return _token_at(weights(adjusted_V, request.sampling), generator.random())


def weights(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What is drawn from: probabilities relative to the highest, float32 [V]; 0 for tokens left out.

    Temperature first, then top_k, top_p and min_p; the likeliest token always stays. The temperature is not 0. If a
    logit is NaN, all are 0.
    """
    V, top_k = len(logits_V), sampling.top_k
    heated_V = logits_V / np.float32(sampling.temperature)
    highest = heated_V.max()

    def relative(heated: np.ndarray) -> np.ndarray:
        # That of a model that has diverged may be infinite.
        values: np.ndarray = np.exp(heated - highest) if np.isfinite(highest) else heated == highest
        return values.astype(np.float32, copy=False)

    weights_V = candidates = relative(heated_V)
    # Multiplied, because masks take ten times as long.
    if 0 < top_k < V:
        largest = np.partition(heated_V, V - top_k)[V - top_k :]
        weights_V = weights_V * (heated_V >= largest[0])
        candidates = relative(largest)
    if sampling.top_p < 1:
        ordered = _until(candidates, sampling.top_p * weights_V.sum(dtype=np.float64))
        weights_V = weights_V * (weights_V >= ordered[-1])
    if sampling.min_p > 0:
        weights_V = weights_V * (weights_V >= sampling.min_p)
    return weights_V


def _until(candidates: np.ndarray, share: float) -> np.ndarray:
    """The largest weights in descending order, as few as sum to `share`; at least one."""
    count = 2048  # enough for most texts; sorting all takes three times as long
    if count < len(candidates):
        largest = np.partition(candidates, len(candidates) - count)[len(candidates) - count :]
        if largest.sum(dtype=np.float64) >= share:
            candidates = largest
    ordered = np.sort(candidates)[::-1]
    return ordered[: _index_at(ordered, _sums(ordered), share, "left") + 1]


def _token_at(weights_V: np.ndarray, share: float) -> int:
    """The token at that share, in [0, 1), of the weights laid end to end. None of weight 0 is."""
    sums = _sums(weights_V)
    return _index_at(weights_V, sums, share * sums.sum(), "right")


def _sums(sizes: np.ndarray) -> np.ndarray:
    """Sums of each `_SUMMED` sizes, float64."""
    return np.add.reduceat(sizes, np.arange(0, len(sizes), _SUMMED), dtype=np.float64)


def _index_at(sizes: np.ndarray, sums: np.ndarray, at: float, side: Literal["left", "right"]) -> int:
    """Index of the size that holds a place in all of them, laid end to end; the last one if all are 0.

    `sums` are those of `_sums`. `side`: which of two sizes holds the place between them; `right` never gives a size
    of 0.
    """
    block, before = _find(sums, at, side)
    return block * _SUMMED + _find(sizes[block * _SUMMED :][:_SUMMED].astype(np.float64), at - before, side)[0]


def _find(sizes: np.ndarray, at: float, side: Literal["left", "right"]) -> tuple[int, float]:
    """The index of `_index_at`, and the sum of the sizes before it."""
    ends = np.cumsum(sizes)
    at = min(at, np.nextafter(ends[-1], 0))  # rounding may have left a bit more
    index = min(int(np.searchsorted(ends, at, side)), len(sizes) - 1)
    return index, float(ends[index - 1]) if index else 0.0


def adjust(logits_V: Tensor, request: Request) -> Tensor:
    """Logits after bias, penalties (as in OpenAI's API, and CTRL's repetition penalty) and `min_tokens`."""
    if not _adjusts(request):
        return logits_V
    sampling = request.sampling
    answer = request.tokens[request.prompt_length :]
    logits_V = logits_V.clone()
    if sampling.repetition_penalty != 1:
        (seen,) = placed([np.array(request.tokens)], logits_V.device)  # repeated ids are written equal values
        score = logits_V[seen]
        scaled = torch.where(score > 0, score / sampling.repetition_penalty, score * sampling.repetition_penalty)
        logits_V[seen] = scaled
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(answer)
        ids, times = placed([np.array(list(counts)), np.array(list(counts.values()))], logits_V.device)
        logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
    if sampling.logit_bias:
        biases = np.array(list(sampling.logit_bias.values()), np.float32)
        ids, bias = placed([np.array(list(sampling.logit_bias)), biases], logits_V.device)
        logits_V[ids] += bias
    if len(answer) < sampling.min_tokens:
        ends = sorted(request.eos_ids | set(sampling.stop_token_ids))
        (ends_E,) = placed([np.array(ends, np.int64)], logits_V.device)
        longer_V = logits_V.index_fill(0, ends_E, -torch.inf)
        # A guide may allow nothing but the end. `torch.where`, because an `if` would wait for the device.
        logits_V = torch.where(longer_V.isneginf().all(), logits_V, longer_V)
    return logits_V


def _adjusts(request: Request) -> bool:
    sampling = request.sampling
    biased = sampling.logit_bias or request.generated < sampling.min_tokens
    penalised = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
    return bool(biased or penalised)


def log_probabilities(logits_NV: Tensor, ids_N: Sequence[int], top: int) -> list[TopLogprobs]:
    """For each row of the model's logits (float32): the log probability of its token, and the `top` likeliest."""
    # -9999 replaces log 0, and NaN from diverged weights: JSON has neither -inf nor NaN.
    logprobs_NV = logits_NV.log_softmax(-1).nan_to_num(nan=-9999.0, neginf=-9999.0)
    (chosen_N1,) = placed([np.array([[i] for i in ids_N])], logits_NV.device)
    own_N = logprobs_NV.gather(1, chosen_N1)[:, 0]
    if top == 0:
        return [(logprob, ()) for logprob in own_N.tolist()]
    best = logprobs_NV.topk(top, dim=-1)
    own, ids, values = (tensor.tolist() for tensor in read(own_N, best.indices, best.values))
    pairs = zip(ids, values, strict=True)
    return [(logprob, tuple(zip(*both, strict=True))) for logprob, both in zip(own, pairs, strict=True)]
