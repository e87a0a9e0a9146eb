"""Which dtype the CPU at hand computes faster: measured at the first start, and kept.

Measured once only: a server that starts while its machine is busy must not give other answers than when idle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nr_serve.disk import cache_folder, whole
from nr_serve.engine.model.packed_linear import PackedLinear, can_pack
from nr_serve.machine import cpuinfo

log = logging.getLogger(__name__)
_SIZE = 2048  # a weight too large for a core's own cache
_TOKENS = (8, 256)  # a small decode step, and a prefill chunk
_ROUNDS = 30
_MARGIN = 1.2  # so that machines of the same kind choose alike
_FORMAT = 1
"""Increased when the measurement changes, so that older results are not read."""
_TELLING = ("model name", "flags", "CPU part", "Features")  # the names on x86, then on ARM


def fastest_dtype() -> torch.dtype:
    """bfloat16 if it is clearly faster for both decode and prefill, else float32.

    The choice is kept in the cache folder for this processor, number of cores and version of torch; it is measured
    if it is not there.
    """
    path = _kept_at()
    kept = _read(path)
    if kept is not None:
        log.info("dtype auto: %s, as measured at an earlier start (%s)", _name(kept), path)
        return kept
    log.info("dtype auto: measuring whether bfloat16 is faster here (only at the first start)")
    chosen = _measured()
    try:
        _write(path, chosen)
    except OSError as error:
        log.warning("dtype auto: the choice cannot be kept and may differ at the next start: %s", error)
    return chosen


def _kept_at() -> Path:
    depends_on = [_FORMAT, platform.machine(), cpuinfo(*_TELLING), os.cpu_count(), torch.__version__]
    return cache_folder() / "dtype" / f"{hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> torch.dtype | None:
    try:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[json.loads(path.read_bytes())["dtype"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("dtype auto: %s is damaged and will be written again: %r", path, error)
        return None


def _write(path: Path, chosen: torch.dtype) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_text(json.dumps({"dtype": _name(chosen)}) + "\n", encoding="utf-8")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def _measured() -> torch.dtype:
    """Measure now, which takes half a second of computing.

    One core is measured, by CPU time, so other load on the machine does not count.
    """
    layers = {dtype: _layer(dtype) for dtype in (torch.float32, torch.bfloat16)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads wait for each other, on a loaded machine most of the time
    try:
        ratios = [_ratio(layers, tokens) for tokens in _TOKENS]
    finally:
        torch.set_num_threads(threads)
    chosen = torch.bfloat16 if min(ratios) >= _MARGIN else torch.float32
    measured = ", ".join(f"{ratio:.1f}x at {tokens} tokens" for ratio, tokens in zip(ratios, _TOKENS, strict=True))
    log.info("dtype auto: %s, measured now; speed of bfloat16 to float32: %s", _name(chosen), measured)
    return chosen


def _ratio(layers: dict[torch.dtype, Callable[[Tensor], Tensor]], tokens: int) -> float:
    """CPU time in float32 over CPU time in bfloat16; rounds alternate, and each dtype's best round counts."""
    x_Td = {dtype: torch.full((tokens, _SIZE), 0.5, dtype=dtype) for dtype in layers}
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in layers}
    for _ in range(_ROUNDS):
        for dtype, layer in layers.items():
            started = time.thread_time()
            layer(x_Td[dtype])
            times[dtype].append(time.thread_time() - started)
    return min(times[torch.float32]) / min(times[torch.bfloat16])


def _layer(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A linear layer, run as a base's layers are where oneDNN multiplies.

    Our own product is faster still in bfloat16, and would have to be compiled first.
    """
    weight = torch.full((_SIZE, _SIZE), 0.5, dtype=dtype)
    return PackedLinear(weight, None, keep=False) if can_pack(dtype) else partial(F.linear, weight=weight)
