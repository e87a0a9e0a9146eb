"""Hash of tensors, for cache keys and for checking that text or weights are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(tensors: Iterable[Tensor]) -> str:
    """Hash of the contents of tensors on the CPU, in order; shapes and names are not included."""
    found = hashlib.sha256()
    for tensor in tensors:
        # As bytes, for numpy has no bfloat16.
        found.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
