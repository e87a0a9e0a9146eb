"""Calibration: the gates of a trained adapter fitted anew, so that it can live beside adapters made since.

Forward passes only; the blocks stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nr_serve.errors import BadRequest
from nr_serve.neutral.format import Adapter, Base, Block, read_adapter, write_adapter
from nr_serve.train import text
from nr_serve.train.attach import AdapterModule, Attached, BlockModule
from nr_serve.train.base import FrozenBase, load_base
from nr_serve.train.gates import LayerFit, fit_gates, gate_classes
from nr_serve.train.pack import Windows
from nr_serve.train.recipe import Gate, Recipe, parse_recipe


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

    The classes are those of its recipe and the target text of every adapter beside it; `changes` replaces keys of
    the recipe's [gate], `carry` its carry. Raises BadAdapterFile for a file that does not fit the base, BadRequest
    for an adapter without a recipe, BadRecipe if text is missing.
    """
    frozen = load_base(base)
    identity = Base(frozen.name, frozen.fingerprint, frozen.layers, frozen.d)
    adapter = read_adapter(new, identity)
    neighbours = {path.stem: read_adapter(path, identity) for path in beside}
    recipe = _recipe(new, adapter)
    values = recipe.gate.model_dump() | {"init": "logistic"} | dict(changes or {})
    gate = parse_recipe(recipe.dump() | {"gate": values}, new.name).gate
    module = AdapterModule.from_file(adapter)
    module.threshold = 0.0  # the fit sets its own
    if carry is not None:
        module.carry = carry
    classes, original = read_calibration_text(recipe, gate, neighbours, frozen, corpus)
    report = fit(frozen, module, [AdapterModule.from_file(a) for a in neighbours.values()], classes, original, gate)
    found = sum(layer.found for layer in report.values()) / len(report)
    print(f"calibrate: gates find {found:.1%} of the target", file=sys.stderr)
    results = {k: v for k, v in adapter.info.results.items() if k != "heldout"}
    results["calibrated"] = {"beside": {n: a.version for n, a in neighbours.items()}, "gate": gate.model_dump()}
    info = replace(adapter.info, carry=module.carry, threshold=0.0, results=results)
    blocks = [_with_gates(block, module.layer(i)) for i, block in enumerate(adapter.blocks)]
    write_adapter(out, info, tuple(blocks))
    return out


def read_calibration_text(
    recipe: Recipe, gate: Gate, neighbours: Mapping[str, Adapter], base: FrozenBase, corpus: Path
) -> tuple[dict[str, Windows], Collection[str]]:
    """The classes that calibrate a recipe's gates beside other adapters, and which of them are original text."""
    background = list(recipe.data.background)
    for name, neighbour in neighbours.items():
        background += [glob for glob in _recipe(Path(name), neighbour).data.target if glob not in background]
    data = recipe.data.model_copy(update={"background": tuple(background)})
    classes = text.read_classes(corpus, data, base.tokenizer, recipe.run)
    return gate_classes(classes, gate.fit_tokens), classes.original


def fit(
    base: FrozenBase,
    module: AdapterModule,
    neighbours: Sequence[AdapterModule],
    classes: Mapping[str, Windows],
    original: Collection[str],
    gate: Gate,
) -> dict[int, LayerFit]:
    """Fit one adapter's gates, the others attached beside it; the base must be unhosted."""
    attached = Attached(base.model, [module, *neighbours])
    return fit_gates(base.model, attached, classes, gate, original=original)


def _with_gates(block: Block | None, fitted: BlockModule | None) -> Block | None:
    if block is None or fitted is None:
        return None
    return replace(block, gate=fitted.gate.detach(), bias=fitted.bias.detach())


def _recipe(path: Path, adapter: Adapter) -> Recipe:
    if "data" not in adapter.info.recipe:
        raise BadRequest(f"{path.stem} carries no recipe, so its text is unknown", param="files")
    return parse_recipe(dict(adapter.info.recipe), path.name)
