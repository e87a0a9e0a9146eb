"""Which device a base runs on."""

from __future__ import annotations

import torch

from nr_serve.config import ServeConfig
from nr_serve.errors import UnsupportedBase


def device_of(config: ServeConfig) -> str:
    """`cpu` or `cuda`, as configured; `auto` is a GPU where torch sees one. Raises UnsupportedBase without it."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedBase("--device cuda was asked for, but torch sees no CUDA device")
    return device
