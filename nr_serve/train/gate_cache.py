"""Fitted gates kept in a folder, with how well they fit, so that gates are fitted once to the same text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nr_serve.disk import cache_folder
from nr_serve.train.gates import FittedGates, LayerFit
from nr_serve.train.tensor_cache import TensorCache, Tensors

GATE_FORMAT = 6
"""Raised when the fit or what is kept of it changes: files of another format are never read again."""


class GateCache:
    """The folder; `gates` in the cache folder unless one is named."""

    def __init__(self, folder: Path | None = None) -> None:
        self._cache = TensorCache(folder if folder is not None else cache_folder() / "gates")

    def fitted(self, key: Mapping[str, Any], fit: Callable[[], FittedGates]) -> FittedGates:
        """What `fit` returns, read from the folder if it was made before under `key` (plain values)."""

        def tensors() -> Tensors:
            made = fit()
            report = json.dumps({layer: asdict(each) for layer, each in made.report.items()})
            return {**made.gates, "report": torch.tensor(list(report.encode()), dtype=torch.uint8)}

        parts = self._cache.get([GATE_FORMAT, key], tensors)
        report = json.loads(bytes(parts.pop("report").tolist()))
        return FittedGates(parts, {int(layer): LayerFit(**each) for layer, each in report.items()})
