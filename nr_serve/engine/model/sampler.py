"""From logits to tokens. Every request is sampled on its own, with noise that depends on its seed alone.

`likeliest` and `sample` are for logits on a CPU; `gpu_sampler` is their counterpart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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


def likeliest(logits_NV: Tensor) -> list[int]:
    """Each row's likeliest token, the first one if several are equal; NOT_A_NUMBER if the row has a NaN."""
    rows_NV = logits_NV.numpy()  # numpy's argmax takes a fifteenth of the time of torch's
    best_N = rows_NV.argmax(-1)  # that of a NaN, if there is one
    nan_N = np.isnan(np.take_along_axis(rows_NV, best_N[:, None], -1)[:, 0])
    token_ids: list[int] = np.where(nan_N, NOT_A_NUMBER, best_N).tolist()
    return token_ids


def likeliest_on_device(logits_NV: Tensor) -> Tensor:
    """As `likeliest`, int64 [N], without waiting for the device."""
    best_N, token_N = logits_NV.max(-1)
    return token_N.masked_fill(best_N.isnan(), NOT_A_NUMBER)


def takes_likeliest(request: Request) -> bool:
    """Whether `sample` would choose the likeliest token of the model's unchanged logits."""
    return request.sampling.temperature < GREEDY and request.progress is None and not _adjusts(request)


def sample(logits_V: Tensor, request: Request) -> int:
    """The next token of one request, from the model's logits for it (float32 [V], not modified)."""
    sampling = request.sampling
    weights_V = adjust(logits_V, request)
    if sampling.temperature >= GREEDY:
        probabilities_V = truncate(weights_V / sampling.temperature, sampling).softmax(-1)
        # argmax(p / e) with exponential noise e draws from p (the Gumbel trick). Each token has its own generator,
        # seeded by the request's seed and the position in its answer: the draw depends neither on the batch nor on
        # preemption.
        generator = np.random.Generator(np.random.PCG64([request.seed % 2**64, request.generated]))
        # Drawn in float64, where an exact 0 is too rare to matter.
        noise_V = torch.from_numpy(generator.standard_exponential(len(logits_V))).float()
        weights_V = probabilities_V / noise_V
    return int(weights_V.numpy().argmax())


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


def truncate(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Logits with -inf for tokens that top_k, top_p and min_p leave out; the likeliest token always stays."""
    if 0 < sampling.top_k < logits_V.shape[-1]:
        kth = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, -torch.inf)
    if sampling.top_p < 1:
        probabilities_V = logits_V.softmax(-1)
        ordered_V = _descending(probabilities_V, least=(1 - sampling.top_p) / (2 * len(logits_V)))
        before_V = ordered_V.cumsum(-1, dtype=torch.float64) - ordered_V
        kept = (before_V < sampling.top_p).sum().clamp(min=1)
        logits_V = logits_V.masked_fill(probabilities_V < ordered_V[kept - 1], -torch.inf)
    if sampling.min_p > 0:
        probabilities_V = logits_V.softmax(-1)
        too_small_V = probabilities_V < sampling.min_p * probabilities_V.max()
        logits_V = logits_V.masked_fill(too_small_V, -torch.inf)
    return logits_V


def _descending(probabilities_V: Tensor, least: float) -> Tensor:
    """Those above `least` in descending order; the rest sum to at most V times `least`."""
    many_V = probabilities_V[~(probabilities_V <= least)]  # keeps NaN
    return torch.from_numpy(np.sort(many_V.numpy())).flip(0)  # takes a twentieth of the time of torch's sort


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
