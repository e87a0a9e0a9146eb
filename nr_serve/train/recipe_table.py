"""The keys of a training recipe as Markdown, made from the models that read it; docs/recipe.md holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nr_serve.train.recipe import Recipe

BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
"""JSON Schema's names of bounds, with their signs."""


def recipe_tables() -> str:
    """Every key of a recipe: a table of the top-level keys, then a description and a table for each section."""
    schema = Recipe.model_json_schema()
    top, parts = {}, []
    for name, field in schema["properties"].items():
        section = _section(field, schema)
        if section is None:
            top[name] = field
        else:
            parts += [f"## `[{name}]`", section["description"], _table(section)]
    return "\n\n".join(["## At the top", _table(schema | {"properties": top}), *parts])


def _section(field: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The section's schema if a field is a section, else None."""
    name = field.get("$ref", "").removeprefix("#/$defs/")
    return schema["$defs"][name] if name else None


def _table(section: Mapping[str, Any]) -> str:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in section["properties"].items():
        default = "must be given" if name in section.get("required", ()) else _default(field["default"])
        cells = [f"`{name}`", _type(field), default, field["description"].replace("\n", " ")]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _default(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(field: Mapping[str, Any]) -> str:
    """A field's JSON Schema type in words."""
    if "anyOf" in field:
        return " or ".join(_type(each) for each in field["anyOf"] if each != {"type": "null"})
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    bounds = [f"{sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field]
    return f"{field['type']} {', '.join(bounds)}".strip()
