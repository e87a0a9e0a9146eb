"""Which dtype the CPU at hand computes faster: measured at the first start, and kept.

A machine that is busy now and idle at the next start must not change what it answers, so it is asked once.
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
from nr_serve.engine.model.processor import cpuinfo

log = logging.getLogger(__name__)
_SIZE = 2048  # a weight no core holds in its own cache
_TOKENS = (8, 256)  # a small decode step, and a prefill chunk
_ROUNDS = 30
_MARGIN = 1.2  # so that machines of one kind do not choose differently
_FORMAT = 1
"""Raised when the measurement changes: what was measured otherwise is not read again."""
_TELLING = ("model name", "flags", "CPU part", "Features")  # the last two on ARM


def fastest_dtype() -> torch.dtype:
    """bfloat16 if it is clearly faster, for decode and prefill alike; else float32.

    Kept in the cache folder for this processor, its number of cores and this torch; measured if it is not there.
    """
    path = _kept_at()
    kept = _read(path)
    if kept is not None:
        log.info("dtype auto: %s, as measured at an earlier start (%s)", _name(kept), path)
        return kept
    log.info("dtype auto: measuring whether bfloat16 is faster here, which is done once")
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
        log.warning("dtype auto: %s is damaged and made again: %r", path, error)
        return None


def _write(path: Path, chosen: torch.dtype) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_text(json.dumps({"dtype": _name(chosen)}) + "\n", encoding="utf-8")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def _measured() -> torch.dtype:
    """Takes half a second of computing, once a machine.

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
    log.info("dtype auto: %s, measured now; speed of bfloat16 to float32: %s", _name(chosen), measured)
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
