"""Reading recipes: a TOML file, changes on the command line, or plain values, all checked alike."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from nr_serve.errors import faults
from nr_serve.train.recipe import BadRecipe, Recipe


def read_toml(path: Path) -> dict[str, Any]:
    """The values in a TOML file. Raises BadRecipe if it cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # drops a byte order mark
    except OSError as error:
        raise BadRecipe(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise BadRecipe(f"{path.name} is not TOML: {error}") from error


def read_recipe(path: Path, *changes: Mapping[str, Any]) -> Recipe:
    """Read and check a recipe, with keys such as `run.tokens` replaced, by each of `changes` after the one before.

    Raises BadRecipe, naming the key at fault.
    """
    values = read_toml(path)
    for key, value in chain.from_iterable(each.items() for each in changes):
        _set(values, key, value)
    return parse_recipe(values, path.name)


def parse_changes(pairs: Iterable[str]) -> dict[str, Any]:
    """Keys and values of `["run.lr=1e-3", "method=lora"]`; values are TOML, or plain words. Raises BadRecipe."""
    changes: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise BadRecipe(f"{pair!r} is not KEY=VALUE")
        try:
            changes[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):  # not TOML: a plain word
            changes[key.strip()] = value.strip()
    return changes


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    _check_key(key)
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise BadRecipe(f"{key}: {section} is not a section")
    values[last] = value
    other = {"h": "capacity", "capacity": "h"}.get(last)
    if sections == ["blocks"] and other is not None:
        values.pop(other, None)


def _check_key(key: str) -> None:
    """Raise BadRecipe, with a suggestion, for a key that recipes do not have."""
    known = list(_keys(Recipe))
    if key in known:
        return
    near = [each for each in known if each.endswith(f".{key}")] or get_close_matches(key, known, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise BadRecipe(f"a recipe has no key {key!r}{meant}")


def _keys(model: type[BaseModel], before: str = "") -> Iterator[str]:
    """Every key of a recipe, including its sections: `run`, `run.lr`, ..."""
    for name, field in model.model_fields.items():
        yield before + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{before}{name}.")


def parse_recipe(values: dict[str, Any], name: str = "recipe") -> Recipe:
    """Check a recipe's values. Raises BadRecipe, naming every key at fault."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise BadRecipe(f"{name}: {faults(error)}") from error
