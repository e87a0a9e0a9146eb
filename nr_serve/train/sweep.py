"""A sweep: one recipe trained several times with some keys changed, one run after another."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nr_serve.errors import NrError
from nr_serve.train.recipe import BadRecipe, Recipe, read_recipe

Changes = Mapping[str, str | int | float | bool | list[int] | list[str]]


class Sweep(BaseModel):
    """A sweep file: which recipe, what is changed in every run, and the runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Path = Field(description="The recipe, relative to the sweep file.")
    set: Changes = Field(default={}, description='Keys changed in every run, such as "run.tokens" = 100000.')
    runs: dict[str, Changes] = Field(min_length=1, description="Keys changed in each run, by its name.")


def read_sweep(path: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Recipe]:
    """The recipe of each run of a sweep file, by name; `changes` come last, in every run.

    Raises BadRecipe, naming the key or the run at fault.
    """
    try:
        sweep = Sweep.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BadRecipe(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRecipe(f"{path.name} is not TOML: {error}") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BadRecipe(f"{path.name}: {faults}") from error
    recipes = {}
    for name, own in sweep.runs.items():
        try:
            recipes[name] = read_recipe(path.parent / sweep.recipe, {**sweep.set, **own, **(changes or {})})
        except BadRecipe as error:
            raise BadRecipe(f"{path.name}, run {name}: {error.message}") from error
    return recipes


def run_sweep(
    path: Path, out: Path, corpus: Path, changes: Mapping[str, Any] | None = None
) -> dict[str, Path | NrError]:
    """Train every run of a sweep in its folder below `out`, in order, going on where an earlier call stopped.

    All recipes are checked before the first run starts. A run that fails does not stop the others: what it raised
    stands in its place.
    """
    from nr_serve.train.trainer import train

    results: dict[str, Path | NrError] = {}
    for name, recipe in read_sweep(path, changes).items():
        done = finished(out / name, recipe)
        if done is not None:
            results[name] = done
            continue
        print(f"sweep: {name}", file=sys.stderr, flush=True)
        try:
            results[name] = train(recipe, out / name, corpus, resume=True)
        except NrError as error:
            print(f"sweep: {name} failed: {error.message}", file=sys.stderr, flush=True)
            results[name] = error
    return results


def finished(run: Path, recipe: Recipe) -> Path | None:
    """What a run made, if it is at the end of that very recipe."""
    from nr_serve.train import checkpoint as checkpoints
    from nr_serve.train.export import result_path

    found = checkpoints.latest(run)
    if found is None:
        return None
    saved, result = checkpoints.load(found), result_path(run, recipe)
    whole: dict[str, Any] = recipe.dump()
    return result if saved.step >= recipe.run.steps and saved.recipe == whole and result.exists() else None
