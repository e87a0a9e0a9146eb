"""A sweep: one recipe trained several times with some keys changed, one run after another."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from nr_serve.errors import Conflict, NrError, faults
from nr_serve.names import NAME
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train import processes
from nr_serve.train import run as training
from nr_serve.train.export import result_path
from nr_serve.train.methods import start_version
from nr_serve.train.recipe import BadRecipe, Recipe
from nr_serve.train.recipe_file import parse_recipe, read_recipe, read_toml
from nr_serve.train.run_text import read_run_text
from nr_serve.train.trainer import TrainingStopped

_say = partial(processes.say, "sweep")


def _no_file(name: str) -> str:
    if Path(name).suffix in (".json", ".md", ".svg"):
        raise ValueError("the comparison's files are named so, beside the runs' folders")
    return name


RunName = Annotated[str, Field(pattern=NAME), AfterValidator(_no_file)]
"""Name of a run, and of its folder."""
Changes = Mapping[str, str | int | float | bool | list[int] | list[str]]


class Sweep(BaseModel):
    """A sweep file: a recipe, changes for every run, and the runs with their own changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Path = Field(description="The recipe, relative to the sweep file.")
    set: Changes = Field(default={}, description='Keys changed in every run, such as "run.tokens" = 100000.')
    runs: dict[RunName, Changes] = Field(min_length=1, description="Keys changed in each run, by its name.")


def read_sweep(path: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Recipe]:
    """The recipe of each run in a sweep file, by run name; `changes` are applied last, in every run.

    Raises BadRecipe, naming the key or the run at fault.
    """
    try:
        sweep = Sweep.model_validate(read_toml(path))
    except ValidationError as error:
        raise BadRecipe(f"{path.name}: {faults(error)}") from error
    recipes = {}
    for name, own in sweep.runs.items():
        try:
            recipes[name] = read_recipe(path.parent / sweep.recipe, sweep.set, own, changes or {})
        except BadRecipe as error:
            raise BadRecipe(f"{path.name}, run {name}: {error.message}") from error
    return recipes


def run_sweep(recipes: Mapping[str, Recipe], out: Path, corpus: Path) -> dict[str, Path | Exception]:
    """Train every run of a sweep in its folder below `out`, in order, continuing where an earlier call stopped.

    The text of all runs is checked before the first one starts. After that a run that fails does not stop the
    others: its exception is its result. All failures are printed at the end. Raises BadRecipe for text that a run
    cannot read; Conflict if a finished run was trained on other text.
    """
    processes.join()
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
            # A traceback keeps the model alive, and so do the tracebacks of the exception's cause and context.
            error.__cause__ = error.__context__ = None
            results[name] = error.with_traceback(None)
    failed = {name: result for name, result in results.items() if isinstance(result, Exception)}
    for name, failure in failed.items():
        _say(f"{name} failed: {failure if isinstance(failure, NrError) else repr(failure)}")
    return results


def _check_text(recipes: Mapping[str, Recipe], out: Path, corpus: Path) -> None:
    """Check the text of every run, also of a finished one: the others are compared with it. Errors name the run."""
    changed = []
    for name, recipe in recipes.items():
        _say(f"checking the text of {name}")
        try:
            digest = read_run_text(recipe, corpus).digest
        except BadRecipe as error:
            raise BadRecipe(f"run {name}: {error.message}") from error
        ended = _ended(out / name, recipe)
        if ended is not None and ended.text_digest != digest:
            changed.append(name)
    if changed:
        raise Conflict(f"the corpus differs from that of finished runs, {', '.join(changed)}; name another folder")


def _run(name: str, recipe: Recipe, folder: Path, corpus: Path) -> Path:
    done = finished(folder, recipe)
    if done is not None:
        return done
    _say(name)
    return training.train(recipe, folder, corpus, resume=True)


def _raised_by_all(error: Exception) -> bool:
    """Whether every process of the sweep raised this error, so that all can go on to the next run."""
    return not processes.several() or (isinstance(error, NrError) and not isinstance(error, TrainingStopped))


def finished(run: Path, recipe: Recipe) -> Path | None:
    """A run's result, if the run has finished exactly this recipe; else None."""
    return None if _ended(run, recipe) is None else result_path(run, recipe)


def _has_weights(result: Path) -> bool:
    return result.is_file() or any(result.glob("*.safetensors"))


def _ended(run: Path, recipe: Recipe) -> checkpoints.Checkpoint | None:
    """A run's newest checkpoint, if the run has finished exactly this recipe; else None."""
    found = checkpoints.latest(run)
    if found is None:
        return None
    saved = checkpoints.load(found)
    ended = saved.stopped or saved.step >= recipe.run.steps
    if not (ended and parse_recipe(saved.recipe) == recipe and _has_weights(result_path(run, recipe))):
        return None
    return saved if saved.may_have_started_from(start_version(recipe)) else None
