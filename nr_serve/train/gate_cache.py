"""Fitted gates kept in a folder, with how well they fit, so that gates are fitted once to the same text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nr_serve.disk import cache_folder
from nr_serve.logs import say
from nr_serve.train.attach import Attached
from nr_serve.train.base import FrozenBase
from nr_serve.train.gates import FittedGates, LayerFit, fit_gates, gate_classes
from nr_serve.train.recipe import BadRecipe, Recipe
from nr_serve.train.tensor_cache import TensorCache, Tensors, digest
from nr_serve.train.text.mix import Classes

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


def fit_once(base: FrozenBase, attached: Attached, classes: Classes, recipe: Recipe) -> FittedGates:
    """The gates of the adapter attached, untrained yet: fitted now, or before to the same text.

    Raises BadRecipe if no layer's gate finds `gate.min_found` of the target.
    """
    gate, (adapter,) = recipe.gate, attached.adapters
    read = gate_classes(classes, gate.fit_tokens)

    def fit() -> FittedGates:
        say("train", "fitting the gates")
        made = fit_gates(base.model, attached, read, gate, original=classes.original)
        if not made.gates:
            raise BadRecipe(f"no layer's gate finds gate.min_found, {gate.min_found:g}, of the target")
        return made

    key = {
        "gate": gate.model_dump(exclude={"threshold", "refit"}),
        "carry": adapter.carry,
        "layers": sorted(adapter.layers),
        "classes": {name: list(windows.ids_NT.shape) for name, windows in read.items()},
        "text": digest(tensor for windows in read.values() for tensor in (windows.ids_NT, windows.offset_NT)),
        "original": sorted(classes.original),
        "base": base.fingerprint,
        "dtype": recipe.run.dtype,
    }
    return GateCache().fitted(key, fit)
