"""Hash of tensors, for keys and for what must be the same text or the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor


def digest(tensors: Iterable[Tensor]) -> str:
    """Hash of the content of tensors on the CPU, one after another; what depends on shapes or names adds them."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.reshape(-1).numpy().data)
    return found.hexdigest()
