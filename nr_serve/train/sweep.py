"""A sweep: one recipe trained several times with some keys changed, one run after another."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nr_serve.errors import NrError, faults
from nr_serve.names import NAME
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train import processes
from nr_serve.train import run as training
from nr_serve.train.export import result_path
from nr_serve.train.recipe import BadRecipe, Recipe
from nr_serve.train.recipe_file import parse_recipe, read_recipe, read_toml
from nr_serve.train.run_text import read_run_text
from nr_serve.train.trainer import TrainingStopped

_say = partial(processes.say, "sweep")
RunName = Annotated[str, Field(pattern=NAME)]
"""A run's folder has its name."""
Changes = Mapping[str, str | int | float | bool | list[int] | list[str]]


class Sweep(BaseModel):
    """A sweep file: which recipe, what is changed in every run, and the runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Path = Field(description="The recipe, relative to the sweep file.")
    set: Changes = Field(default={}, description='Keys changed in every run, such as "run.tokens" = 100000.')
    runs: dict[RunName, Changes] = Field(min_length=1, description="Keys changed in each run, by its name.")


def read_sweep(path: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Recipe]:
    """The recipe of each run of a sweep file, by name; `changes` come last, in every run.

    Raises BadRecipe, naming the key or the run at fault.
    """
    try:
        sweep = Sweep.model_validate(read_toml(path))
    except ValidationError as error:
        raise BadRecipe(f"{path.name}: {faults(error)}") from error
    recipes = {}
    for name, own in sweep.runs.items():
        try:
            recipes[name] = read_recipe(path.parent / sweep.recipe, {**sweep.set, **own, **(changes or {})})
        except BadRecipe as error:
            raise BadRecipe(f"{path.name}, run {name}: {error.message}") from error
    return recipes


def run_sweep(recipes: Mapping[str, Recipe], out: Path, corpus: Path) -> dict[str, Path | Exception]:
    """Train every run of a sweep in its folder below `out`, in order, going on where an earlier call stopped.

    The text of the runs that are left is checked before the first one starts. A run that fails then does not stop
    the others: what it raised stands in its place. The failures are told at the end.
    """
    processes.from_first(lambda: _check_text(recipes, out, corpus))
    results: dict[str, Path | Exception] = {}
    for name, recipe in recipes.items():
        try:
            results[name] = _run(name, recipe, out / name, corpus)
        except Exception as error:
            if not _raised_by_all(error):
                raise
            if not isinstance(error, NrError):
                traceback.print_exc()
            # A traceback holds on to the model, and so does that of what an error was raised from.
            error.__cause__ = error.__context__ = None
            results[name] = error.with_traceback(None)
    failed = {name: result for name, result in results.items() if isinstance(result, Exception)}
    for name, failure in failed.items():
        _say(f"{name} failed: {failure if isinstance(failure, NrError) else repr(failure)}")
    return results


def _check_text(recipes: Mapping[str, Recipe], out: Path, corpus: Path) -> None:
    """Raise what keeps a run that is left from starting with its text; a BadRecipe names the run."""
    for name, recipe in recipes.items():
        if finished(out / name, recipe) is not None:
            continue
        _say(f"checking the text of {name}")
        try:
            read_run_text(recipe, corpus)
        except BadRecipe as error:
            raise BadRecipe(f"run {name}: {error.message}") from error


def _run(name: str, recipe: Recipe, folder: Path, corpus: Path) -> Path:
    done = finished(folder, recipe)
    if done is not None:
        return done
    _say(name)
    return training.train(recipe, folder, corpus, resume=True)


def _raised_by_all(error: Exception) -> bool:
    """Whether the other processes of the sweep, if there are any, are past the failed run too."""
    return not processes.several() or (isinstance(error, NrError) and not isinstance(error, TrainingStopped))


def finished(run: Path, recipe: Recipe) -> Path | None:
    """What a run made, if it is at the end of that very recipe."""
    found = checkpoints.latest(run)
    if found is None:
        return None
    saved, result = checkpoints.load(found), result_path(run, recipe)
    ended = saved.stopped or saved.step >= recipe.run.steps
    return result if ended and parse_recipe(saved.recipe) == recipe and result.exists() else None
