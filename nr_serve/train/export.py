"""From a run to an adapter file: at its end, or from its newest checkpoint at any time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nr_serve.errors import Conflict
from nr_serve.neutral.format import AdapterInfo, write_adapter
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train import text
from nr_serve.train.attach import AdapterModule, Attached
from nr_serve.train.base import FrozenBase, load_base
from nr_serve.train.gates import fit_gates, gate_classes
from nr_serve.train.recipe import Recipe, parse_recipe


def export_run(
    run: Path,
    path: Path,
    *,
    corpus: Path | None = None,
    percentile: float | None = None,
    threshold: float = 0.0,
) -> Path:
    """Write the adapter of the newest checkpoint in folder `run` to `path`; the run may still be going.

    With `percentile` the gates' thresholds are first set anew, at that percentile of the logits of the text in
    `corpus` on the stream as the trained blocks leave it. `threshold` is written to the file: a gate there is
    relu(m - threshold), so that a little above 0 trades some learning for less leak.
    Raises Conflict if there is no checkpoint.
    """
    if percentile is not None and corpus is None:
        raise Conflict("setting thresholds anew needs the corpus")
    found = checkpoints.latest(run)
    if found is None:
        raise Conflict(f"{run} holds no checkpoint")
    saved = checkpoints.load(found)
    recipe = parse_recipe(saved.recipe, f"the recipe in {found}")
    base = load_base(recipe.base, recipe.run.dtype)
    if saved.base_fingerprint != base.fingerprint:
        raise Conflict(f"the base differs from that of the run in {run}")
    adapter = restore(recipe, base, saved.blocks)
    results: dict[str, Any] = {"tokens": saved.step * recipe.run.batch_tokens}
    if percentile is not None and corpus is not None:
        recalibrate(recipe, base, adapter, corpus, percentile)
        results["percentile"] = percentile
    elif not threshold:  # what was measured while it trained holds for the thresholds of the training alone
        results["heldout"] = saved.results
    return write_run(path, recipe, base, adapter, results, threshold)


def restore(recipe: Recipe, base: FrozenBase, blocks: Mapping[str, torch.Tensor]) -> AdapterModule:
    """The adapter of a checkpoint."""
    adapter = AdapterModule.fresh(
        base.layers, base.d, recipe.blocks.width(base.parameters, base.d, base.layers), recipe.blocks.carry, 0
    )
    for i in range(adapter.depth):
        if f"layers.{i}.gate" not in blocks:
            adapter.drop(i)
    adapter.load_state_dict(dict(blocks))
    return adapter


def recalibrate(recipe: Recipe, base: FrozenBase, adapter: AdapterModule, corpus: Path, percentile: float) -> None:
    """Set the adapter's thresholds anew on the stream as it is, with the classes that fitted its gates."""
    gate = recipe.gate.model_copy(update={"percentile": percentile})
    classes = text.read_classes(corpus, recipe.data, base.tokenizer, recipe.run)
    attached = Attached(base.model, [adapter])
    fit_gates(base.model, attached, gate_classes(classes, gate.fit_tokens), gate, only_bias=True)


def write_run(
    path: Path,
    recipe: Recipe,
    base: FrozenBase,
    adapter: AdapterModule,
    results: Mapping[str, Any],
    threshold: float = 0.0,
) -> Path:
    """Write the adapter file, weights in bfloat16."""
    info = AdapterInfo(
        base=base.name,
        base_fingerprint=base.fingerprint,
        layers=base.layers,
        d=base.d,
        carry=recipe.blocks.carry,
        threshold=threshold,
        domain=recipe.domain,
        recipe=recipe.dump(),
        results=results,
    )
    write_adapter(path, info, adapter.export(torch.bfloat16))
    return path
