"""Large tensors in huge pages where the system has them.

What is read from end to end in every step arrives up to twice as fast from pages of 2 MiB as from those of 4 KiB.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

_HUGE = 2**21  # bytes: the usual size of a huge page


def zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`; if large and in a Linux machine's memory, in huge pages where that allows it.

    Then memory is taken as it is written.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or sys.platform != "linux" or size < _HUGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without huge pages: others do as well
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
