"""Calibration: the gates of a trained adapter fitted anew, so that it can live beside adapters made since.

Forward passes only; the blocks stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nr_serve.errors import BadRequest
from nr_serve.neutral.format import Adapter, Base, Block, read_adapter, write_adapter
from nr_serve.train import text
from nr_serve.train.attach import AdapterModule, Attached, BlockModule
from nr_serve.train.base import load_base
from nr_serve.train.entries import DATASETS
from nr_serve.train.gates import fit_gates, gate_classes
from nr_serve.train.recipe import Recipe, parse_recipe
from nr_serve.train.sources import find_files


def calibrate(
    new: Path,
    beside: Sequence[Path],
    corpus: Path,
    out: Path,
    *,
    base: str = "default",
    carry: float | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Fit the gates of the adapter in `new` on the stream as it and those in `beside` leave it; write to `out`.

    The classes are those of its recipe and the target text of every adapter beside it; gates are fitted as the
    recipe says, by logistic regression if they were random there. `changes` replaces keys of the recipe's [gate],
    `carry` its carry; the new file's recipe tells of both. Raises BadAdapterFile for a file that does not fit the
    base, BadRequest for an adapter without a recipe, BadRecipe if text is missing.
    """
    frozen = load_base(base)
    identity = Base(frozen.name, frozen.fingerprint, frozen.layers, frozen.d)
    adapter = read_adapter(new, identity)
    neighbours = {path.stem: read_adapter(path, identity) for path in beside}
    recipe = _recipe(new, adapter)
    gate = recipe.gate.model_dump() | ({} if recipe.gate.fitted else {"init": "logistic"}) | dict(changes or {})
    blocks = recipe.blocks.model_dump() | ({} if carry is None else {"carry": carry})
    data = recipe.data.model_dump() | {"background": _background(recipe, neighbours, corpus)}
    recipe = parse_recipe(recipe.dump() | {"gate": gate, "blocks": blocks, "data": data}, new.name)
    module = AdapterModule.from_file(adapter)
    module.threshold = 0.0  # the fit sets its own
    module.carry = recipe.blocks.carry if carry is not None else module.carry
    classes = text.read_classes(corpus, recipe.data, frozen.tokenizer, recipe.run)
    attached = Attached(frozen.model, [module, *map(AdapterModule.from_file, neighbours.values())])
    chosen = gate_classes(classes, recipe.gate.fit_tokens)
    report = fit_gates(frozen.model, attached, chosen, recipe.gate, original=classes.original)
    found = sum(layer.found for layer in report.values()) / len(report)
    print(f"calibrate: gates find {found:.1%} of the target", file=sys.stderr)
    results = {k: v for k, v in adapter.info.results.items() if k != "heldout"}
    results["calibrated"] = {"beside": {name: neighbour.version for name, neighbour in neighbours.items()}}
    info = replace(adapter.info, carry=module.carry, threshold=0.0, recipe=recipe.dump(), results=results)
    fitted = [_with_gates(block, module.layer(i)) for i, block in enumerate(adapter.blocks)]
    write_adapter(out, info, tuple(fitted))
    return out


def _background(recipe: Recipe, neighbours: Mapping[str, Adapter], corpus: Path) -> tuple[str, ...]:
    """The recipe's background and the neighbours' target text that has no part in the recipe yet."""
    data = recipe.data
    named = [entry for entry in (*data.target, *data.original, *data.background) if not entry.startswith(DATASETS)]
    read = {path.name for path in find_files(corpus, named)}
    background = list(data.background)
    for name, neighbour in neighbours.items():
        for entry in _recipe(Path(name), neighbour).data.target:
            if entry.startswith(DATASETS):
                background += [entry] if entry not in background else []
                continue
            new = [path.name for path in find_files(corpus, [entry]) if path.name not in read]
            background += new
            read |= set(new)
    return tuple(background)


def _with_gates(block: Block | None, fitted: BlockModule | None) -> Block | None:
    if block is None or fitted is None:
        return None
    return replace(block, gate=fitted.gate.detach(), bias=fitted.bias.detach())


def _recipe(path: Path, adapter: Adapter) -> Recipe:
    if "data" not in adapter.info.recipe:
        raise BadRequest(f"{path.stem} carries no recipe, so its text is unknown", param="files")
    return parse_recipe(dict(adapter.info.recipe), path.name)
