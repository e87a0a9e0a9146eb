"""Fitted gates kept in a folder, with how well they fit, so that gates are fitted once to the same text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from safetensors.torch import load, save

from nr_serve.disk import cache_folder
from nr_serve.logs import say
from nr_serve.train.attach import Attached
from nr_serve.train.digest import digest
from nr_serve.train.file_cache import FileCache
from nr_serve.train.frozen_base import FrozenBase
from nr_serve.train.gates import FittedGates, LayerFit, fit_gates, gate_classes
from nr_serve.train.recipe import BadRecipe, Recipe
from nr_serve.train.text.classes import Classes

GATE_FORMAT = 9
"""Increased when the fit or the file format changes, so that files of another format are never read."""


def kept(key: Mapping[str, Any], fit: Callable[[], FittedGates]) -> FittedGates:
    """The result of `fit`, read from the cache folder if it was made before under `key` (plain values)."""
    return FileCache(cache_folder() / "gates").get([GATE_FORMAT, key], fit, _dump, _load)


def _dump(fitted: FittedGates) -> bytes:
    report = json.dumps({layer: asdict(each) for layer, each in fitted.report.items()})
    return report.encode() + b"\n" + save(dict(fitted.gates))


def _load(content: bytes) -> FittedGates:
    report, _, gates = content.partition(b"\n")
    return FittedGates(load(gates), {int(layer): LayerFit(**each) for layer, each in json.loads(report).items()})


def fit_once(base: FrozenBase, attached: Attached, classes: Classes, recipe: Recipe) -> FittedGates:
    """The gates for the attached, untrained adapter: fitted now, or read if fitted to the same text before.

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
        "classes": {name: list(text.windows.ids_NT.shape) for name, text in read.items()},
        "text": digest(
            tensor
            for text in read.values()
            for tensor in (text.windows.ids_NT, text.windows.offset_NT, text.own_NT)
        ),
        "original": sorted(classes.original),
        "base": base.contents,
        "dtype": recipe.run.dtype,
    }
    return kept(key, fit)
