"""Reads a run back from its folder: its recipe, its base, and a learner with the weights it currently keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nr_serve.errors import Conflict
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train.frozen_base import FrozenBase, best_device, load_base
from nr_serve.train.learner import Learner
from nr_serve.train.methods import make_learner
from nr_serve.train.recipe import Recipe
from nr_serve.train.recipe_file import parse_recipe


def read_run(run: Path) -> tuple[Recipe, checkpoints.Checkpoint]:
    """A run's recipe, and the checkpoint whose weights it currently keeps. Raises Conflict if there is none."""
    saved = checkpoints.kept(run)
    if saved is None:
        raise Conflict(f"{run} holds no checkpoint")
    recipe = parse_recipe(saved.recipe, f"the recipe in {saved.folder}")
    return recipe, saved


def load_run(run: Path, dtype: str | None = None) -> tuple[Recipe, FrozenBase, Learner, checkpoints.Checkpoint]:
    """A run with the weights that it currently keeps, on a GPU if there is one.

    These are the newest checkpoint's weights, or the best one's if the run has patience, with the gates that were
    fitted again after the last step. The base's weights are in `dtype` (default: as in training). Raises Conflict
    if there is no checkpoint or the base has changed; BadCheckpoint.
    """
    recipe, saved = read_run(run)
    weights = saved.final()  # read now: a run that is still going may remove this checkpoint while the base loads
    base = load_base(recipe.base, dtype or recipe.base_dtype, best_device())
    if saved.base_contents != base.contents:
        raise Conflict(f"the base differs from that of the run in {run}")
    learner = make_learner(recipe, base, restored=True).to(base.device)
    load_weights(learner, weights)
    return recipe, base, learner, saved


def load_weights(learner: Learner, weights: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's tensors into a fresh learner; layers without a block in the checkpoint lose theirs.

    Raises BadCheckpoint if names or shapes do not match.
    """
    adapter = learner.adapter
    if adapter is not None:
        adapter.keep({name.removeprefix("adapter.") for name in weights})
    odd = checkpoints.odd_one(weights, learner.trained_state())
    if odd is not None:
        raise checkpoints.BadCheckpoint(f"the checkpoint is not of this recipe and base: {odd}")
    learner.load_state_dict(dict(weights), strict=False)
