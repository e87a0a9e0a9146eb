"""Hash of tensors, for cache keys and for checking that text or weights are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor


def digest(tensors: Iterable[Tensor]) -> str:
    """Hash of the contents of tensors on the CPU, in order; shapes and names are not included."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.reshape(-1).numpy().data)
    return found.hexdigest()
