"""Calibration: the gates of a trained adapter fitted anew, so that it can live beside adapters made since.

Runs forward passes only; the blocks do not change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nr_serve.disk import writing
from nr_serve.errors import BadRequest
from nr_serve.logs import say
from nr_serve.neutral.format import Adapter, AdapterInfo, Block, naming, read_info, write_adapter
from nr_serve.train import text
from nr_serve.train.attach import Attached
from nr_serve.train.blocks import AdapterModule, BlockModule
from nr_serve.train.frozen_base import FrozenBase, best_device, load_base, read_adapters
from nr_serve.train.gates import refit_gates
from nr_serve.train.recipe import Data, Gate, Recipe
from nr_serve.train.recipe_file import parse_recipe
from nr_serve.train.text.classes import Classes
from nr_serve.train.text.sources import Source, find_sources

_say = partial(say, "calibrate")


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
    """Fit the gates of the adapter in `new` on the stream that it and those in `beside` produce; write to `out`.

    The classes are those of its recipe, and the target text of every adapter in `beside`, as much of each language
    as of the new adapter's own. Gates are fitted as the recipe says, in the type the adapter was trained in; if
    its gates were random, by logistic regression. Every block keeps a gate, however little the gate finds.
    `changes` replaces keys of the recipe's [gate], and `carry` its carry; the new file's recipe has both. The
    file's threshold stays, unless `changes` has another.

    Raises BadAdapterFile for a file that does not fit the base; BadRequest for an adapter without a recipe or
    without gates, and for two with the same name; BadRecipe if text is missing; CannotWrite.
    """
    with naming(new):
        recipe = _new_recipe(new, read_info(new), carry, changes or {})
    frozen = load_base(base, recipe.base_dtype, best_device())
    neighbours = read_adapters([new, *beside], frozen)
    adapter = neighbours.pop(new.stem)
    learned = _target_text(neighbours, corpus)
    added = _not_named(recipe.data, learned, corpus)
    written = [source for source in added if source.reads_alike(recipe.data.text_field)]
    unwritten = [source for source in added if source not in written]  # a recipe has one `text_field`
    recipe = _with_background(recipe, [source.entry(corpus) for source in written])
    _say("reading and packing the text")
    classes = text.read_classes(corpus, recipe.data, frozen.tokenizer, recipe.run, background=unwritten)
    module = AdapterModule.from_file(adapter)
    module.threshold = recipe.gate.resolved.threshold  # as in training
    module.carry = module.carry if carry is None else carry
    _refit(frozen, module, neighbours, classes, recipe.gate, contested={source.language for source in learned})
    info = replace(
        adapter.info,
        carry=module.carry,
        threshold=module.threshold,
        recipe=recipe.dump(),
        results=_results(adapter, neighbours),
    )
    blocks = tuple(_with_gate(block, module.layer(i)) for i, block in enumerate(adapter.blocks))
    with writing(out):
        write_adapter(out, info, blocks)
    return out


def _refit(
    base: FrozenBase,
    module: AdapterModule,
    neighbours: Mapping[str, Adapter],
    classes: Classes,
    gate: Gate,
    contested: Collection[str],
) -> None:
    """Fit the gates of `module` again, in place, with the neighbours attached."""
    modules = [module, *map(AdapterModule.from_file, neighbours.values())]
    attached = Attached(base.model, [each.to(base.device) for each in modules])
    _say("fitting the gates")
    _say(refit_gates(base.model, attached, classes, gate, contested).summary())


def _results(adapter: Adapter, neighbours: Mapping[str, Adapter]) -> dict[str, Any]:
    """The old file's results that still hold, and the adapters that the new gates were fitted beside."""
    kept = {name: value for name, value in adapter.info.results.items() if name != "heldout"}
    return kept | {"calibrated": {"beside": {name: each.version for name, each in neighbours.items()}}}


def _new_recipe(file: Path, info: AdapterInfo, carry: float | None, changes: Mapping[str, Any]) -> Recipe:
    """The recipe of the new, fitted gates, with the file's threshold unless `changes` has another."""
    recipe = _recipe(file.stem, info)
    if not recipe.has_gates:
        raise BadRequest(f"{file} was trained without gates: its blocks know no text but their own", param="file")
    kept = sorted({"kind", "trained"} & changes.keys())
    if kept:
        raise BadRequest(f"gate.{kept[0]} cannot be changed: the blocks were trained with it", param="set")
    idle = sorted({"refit", "min_found"} & changes.keys())
    if idle:
        raise BadRequest(f"gate.{idle[0]} does nothing here: every block's gate is fitted, once", param="set")
    init = {} if recipe.gate.fitted else {"init": "logistic"}
    gate = recipe.gate.model_dump() | init | {"threshold": info.threshold} | dict(changes)
    blocks = recipe.blocks.model_dump() | ({} if carry is None else {"carry": carry})
    return parse_recipe(recipe.dump() | {"gate": gate, "blocks": blocks}, file.name)


def _with_background(recipe: Recipe, entries: Sequence[str]) -> Recipe:
    background = (*recipe.data.background, *entries)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"background": background})})


def _target_text(neighbours: Mapping[str, Adapter], corpus: Path) -> list[Source]:
    """The neighbours' target text, read as their own recipes say."""
    recipes = (_recipe(name, neighbour.info).data for name, neighbour in neighbours.items())
    return [source for its in recipes for source in find_sources(corpus, its.target, its.text_field)]


def _not_named(data: Data, learned: Sequence[Source], corpus: Path) -> list[Source]:
    """Those of `learned` that the recipe does not name yet, each once."""
    parts = (data.target, data.original, data.background)
    seen = {source.identity for part in parts for source in find_sources(corpus, part, data.text_field)}
    added = []
    for source in learned:
        if source.identity not in seen:
            seen.add(source.identity)
            added.append(source)
    return added


def _with_gate(block: Block | None, fitted: BlockModule | None) -> Block | None:
    if block is None or fitted is None:
        return None
    return replace(block, gate=fitted.gate.detach(), bias=fitted.bias.detach())


def _recipe(name: str, info: AdapterInfo) -> Recipe:
    if "data" not in info.recipe:
        raise BadRequest(f"{name} carries no recipe, so its text is unknown", param="files")
    return parse_recipe(dict(info.recipe), name)
