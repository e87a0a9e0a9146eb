"""Writes a run's result: an adapter file, or a baseline's folder; from the run's end or its newest checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nr_serve.disk import writing
from nr_serve.errors import BadRequest
from nr_serve.neutral import host
from nr_serve.neutral.format import AdapterInfo, ServedGate, write_adapter
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train.blocks import AdapterModule
from nr_serve.train.frozen_base import FrozenBase
from nr_serve.train.learner import Learner
from nr_serve.train.methods import save_lora
from nr_serve.train.recipe import Recipe
from nr_serve.train.restore import load_run


def export_run(run: Path, path: Path, *, threshold: float | None = None) -> Path:
    """Write to `path` the adapter that the run in folder `run` has so far; the run may still be going.

    `threshold` replaces the recipe's `gate.threshold`. Raises Conflict if there is no checkpoint, BadRequest if
    the run makes no adapter.
    """
    recipe, base, learner, saved = load_run(run)
    gate = _served_gate(recipe)
    if learner.adapter is None or gate is None:
        raise BadRequest(f"the run in {run} makes no adapter file: {_why(recipe)}")
    if threshold is not None:
        if not recipe.has_gates:
            raise BadRequest("blocks without gates have no threshold", param="threshold")
        recipe = recipe.with_gate(threshold=threshold)
    results: dict[str, Any] = {"tokens": saved.step * recipe.run.batch_tokens}
    other_gates = saved.is_refitted or recipe.threshold != learner.adapter.threshold
    if saved.measured_step == saved.step and not other_gates:
        results["heldout"] = saved.results
    return _write_blocks(path, recipe, gate, base, learner.adapter, results)


def write_result(out: Path, recipe: Recipe, base: FrozenBase, learner: Learner, results: Mapping[str, Any]) -> Path:
    """Write a finished run's result: an adapter file, or else a folder for PEFT or transformers.

    It is written completely or not at all. Raises CannotWrite.
    """
    path, gate = result_path(out, recipe), _served_gate(recipe)
    if learner.adapter is not None and gate is not None:
        return _write_blocks(path, recipe, gate, base, learner.adapter, results)
    with writing(path):
        _write_folder(path, recipe, base, learner)
    return path


def _write_folder(path: Path, recipe: Recipe, base: FrozenBase, learner: Learner) -> None:
    part = path.with_name(f".{path.name}.part")
    _clear(part)
    if learner.adapter is not None:
        checkpoints.save_weights(part, learner.trained_state())
    else:
        host.unhost_blocks(base.model)  # so that the layers get their original names back
        if recipe.method == "lora":
            save_lora(part, base)
        else:
            base.model.save_pretrained(part)
        base.tokenizer.save_pretrained(part)
    _clear(path)
    part.rename(path)


def _clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def result_path(out: Path, recipe: Recipe) -> Path:
    """Path of the result of a run in `out`."""
    return out / (f"{recipe.domain}.safetensors" if _served_gate(recipe) else recipe.method)


def _write_blocks(
    path: Path,
    recipe: Recipe,
    gate: ServedGate,
    base: FrozenBase,
    adapter: AdapterModule,
    results: Mapping[str, Any],
) -> Path:
    """Write the adapter file, weights in bfloat16. Raises CannotWrite."""
    info = AdapterInfo(
        base=base.name,
        base_fingerprint=base.fingerprint,
        layers=base.layers,
        d=base.d,
        carry=adapter.carry,
        threshold=recipe.threshold,
        gate=gate,
        domain=recipe.domain,
        recipe=recipe.dump(),
        results=results,
    )
    with writing(path):
        write_adapter(path, info, adapter.export(torch.bfloat16))
    return path


def _served_gate(recipe: Recipe) -> ServedGate | None:
    """The kind of gate in an adapter file's metadata; None if the recipe makes no adapter file."""
    if recipe.method not in ("neutral", "adapter"):
        return None
    if not recipe.has_gates:
        return "relu"  # a block without a gate: w = 0 and b = 1 make it 1
    return recipe.gate.kind if recipe.gate.kind in ("relu", "relu1") else None


def _why(recipe: Recipe) -> str:
    if recipe.method in ("lora", "finetune"):
        return f"its method is {recipe.method}"
    return f"only relu and relu1 gates are served, not {recipe.gate.kind}"
