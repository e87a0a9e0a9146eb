"""Which dtype the CPU at hand computes faster, measured at start-up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nr_serve.engine.packed_linear import PackedLinear, can_pack

log = logging.getLogger(__name__)
_SIZE = 2048  # a weight no core holds in its own cache
_TOKENS = (8, 256)  # a small decode step, and a prefill chunk
_ROUNDS = 10
_MARGIN = 1.2  # so that one machine does not choose now this, now that


@torch.inference_mode()
def fastest_dtype() -> torch.dtype:
    """bfloat16 if it is clearly faster, for decode and prefill alike; else float32. Takes about 0.2 s.

    Measured on one core, by the time that it computes: what else the machine is at does not count.
    """
    layers = {dtype: _layer(dtype) for dtype in (torch.float32, torch.bfloat16)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other, and on a loaded machine for little else
    try:
        ratios = [_ratio(layers, tokens) for tokens in _TOKENS]
    finally:
        torch.set_num_threads(threads)
    chosen = torch.bfloat16 if min(ratios) >= _MARGIN else torch.float32
    measured = ", ".join(f"{ratio:.1f}x at {tokens} tokens" for ratio, tokens in zip(ratios, _TOKENS, strict=True))
    log.info("dtype auto: %s; speed of bfloat16 to float32: %s", str(chosen).removeprefix("torch."), measured)
    return chosen


def _ratio(layers: dict[torch.dtype, Callable[[Tensor], Tensor]], tokens: int) -> float:
    """CPU time in float32 to that in bfloat16; rounds alternate, the best of each counts."""
    x_Td = {dtype: torch.full((tokens, _SIZE), 0.5, dtype=dtype) for dtype in layers}
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in layers}
    for _ in range(_ROUNDS):
        for dtype, layer in layers.items():
            started = time.thread_time()
            layer(x_Td[dtype])
            times[dtype].append(time.thread_time() - started)
    return min(times[torch.float32]) / min(times[torch.bfloat16])


def _layer(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A linear layer as a base's are run."""
    weight = torch.full((_SIZE, _SIZE), 0.5, dtype=dtype)
    return PackedLinear(weight, None, keep=False) if can_pack(dtype) else partial(F.linear, weight=weight)
