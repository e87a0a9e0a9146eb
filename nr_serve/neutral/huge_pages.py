"""Large tensors in huge pages where the system has them.

What is read from end to end in every step arrives up to twice as fast from pages of 2 MiB as from those of 4 KiB.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty`, in huge pages if it is large and on a Linux machine's CPU, else in those there are."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux":
        _ask(tensor)
    return tensor


def zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`, in such pages."""
    return empty(shape, dtype=dtype, device=device).zero_()


def _ask(tensor: Tensor) -> None:
    """Ask for huge pages where a tensor's memory, not yet written, spans whole pages."""
    begin = math.ceil(tensor.data_ptr() / mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        # What it returns does not matter: a system without huge pages refuses, and all works without.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
