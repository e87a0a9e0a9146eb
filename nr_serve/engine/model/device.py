"""Chooses a base's device, and moves a step's data to and from it with as few waits as possible.

Each copy from unpinned memory waits for the device, as does each value read. So a step's inputs go to the device
as one block of pinned memory, and its outputs come back with a single wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from nr_serve.config import ServeConfig
from nr_serve.errors import UnsupportedBase

_ALIGNED = 16  # bytes


def device_of(config: ServeConfig) -> str:
    """`cpu` or `cuda`, as configured; `auto` is a GPU where torch sees one. Raises UnsupportedBase without it."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedBase("--device cuda was asked for, but torch sees no CUDA device")
    return device


def placed(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on the device, on a CPU without a copy. Does not wait for the device.

    The tensors share one block of memory, each aligned as kernels need it. Torch reuses the pinned block only when
    the copy is done.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return _as_block(arrays, device)


def _as_block(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    starts = [0, *accumulate(-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays)]
    pinned = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    block = pinned.numpy()
    for start, array in zip(starts, arrays, strict=False):
        block[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = pinned.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


def read(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the host's memory, on a CPU as they are. Waits for the device once."""
    return copying(*tensors)()


def copying(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Start to copy the tensors to the host's memory. Returns what waits for the device once and gives them."""
    if all(tensor.is_cpu for tensor in tensors):
        return lambda: list(tensors)
    # With non_blocking, torch copies into pinned memory of its own.
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(tensors[0].device))

    def wait() -> list[Tensor]:
        copied.synchronize()
        return copies

    return wait
