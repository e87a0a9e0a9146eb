"""The corpus recipe: a TOML file that says where text comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nr_serve.errors import BadRequest, faults
from nr_serve.names import is_name
from nr_serve.train.recipe_file import read_toml

Kind = Literal["deb", "pypi", "ddtp", "folder"]
Format = Literal["html", "mallard", "man", "mo", "text", "plain", "fortune", "jsonl", "csv", "ddtp"]


class Source(BaseModel):
    """One text source in one language, with `{lang}` in the TOML table's strings already replaced."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # "hu.lohelp": the language and the table's name
    language: str
    kind: Kind  # "deb", "pypi": files in packages; "ddtp": apt's lists of descriptions; "folder": the user's files
    licence: str = ""  # may be left out for kind "folder" only
    format: Format = "ddtp"
    packages: tuple[str, ...] = ()
    folder: str = ""  # of the user's own files, relative to the corpus recipe's
    files: tuple[str, ...] = ()  # globs below the unpacked packages, or below the folder
    original: tuple[str, ...] = ()  # globs of the English originals: untranslated paragraphs are dropped
    field: str = ""  # holds the text: a field name (jsonl) or a column number, from 0 (csv)
    document: tuple[str, ...] = ()  # csv: columns, from 0, that identify the document of a row
    match: str = ""  # text: a regular expression whose first group is a paragraph
    strip: str = ""  # a regular expression to remove from every paragraph
    # Most text kept, in 10**6 characters, taken evenly from the whole source.
    limit_mb: float = Field(default=3.0, gt=0, allow_inf_nan=False)

    def is_same(self, kept: Mapping[str, Any]) -> bool:
        """Whether `kept`, from JSON, is this same source; fields added since then have their defaults in it."""
        try:
            return Source.model_validate(kept) == self
        except ValidationError:
            return False


READERS_OF: Mapping[str, tuple[Format, ...]] = {"field": ("jsonl", "csv"), "document": ("csv",), "match": ("text",)}
"""Keys that only some formats read, with these formats."""


def read_recipe(path: Path) -> list[Source]:
    """The sources of the recipe at `path`; raises `BadRequest` naming what is wrong with it."""
    tables = read_toml(path).get("source", [])
    if not isinstance(tables, list):
        raise BadRequest(f"corpus recipe {path}: a source is a table [[source]], with two brackets")
    sources = [source for table in tables for source in _expand(table)]
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not sources or twice:
        raise BadRequest(f"corpus recipe {path}: " + (f"{', '.join(twice)} named twice" if twice else "no sources"))
    return sources


def _expand(table: dict[str, Any]) -> list[Source]:
    """One source for each language of a table."""
    if not isinstance(table, dict):
        raise BadRequest(f"corpus recipe: a source is a table [[source]], not {table!r}")
    name, languages = table.get("name"), table.get("languages")
    if not name or not languages or not isinstance(languages, list):
        raise BadRequest(f"corpus recipe: a source lacks its name or its list of languages: {table}")
    rest = {key: value for key, value in table.items() if key not in ("name", "languages", "locales")}
    if "language" in rest:
        raise BadRequest(f"corpus recipe: source {name}: language: not a known key; a list of languages is")
    for each in (name, *languages):  # both become parts of file names in the corpus folder
        if not isinstance(each, str) or not is_name(each):
            raise BadRequest(f"corpus recipe: {each!r} is no name of a source or of a language")
    locales = table.get("locales", {})
    if not isinstance(locales, dict) or not all(isinstance(each, str) for each in locales.values()):
        raise BadRequest(f"corpus recipe: source {name}: locales is no table of languages and locales")
    return [_fill(name, language, str(locales.get(language, language)), rest) for language in languages]


def _fill(name: str, language: str, locale: str, rest: dict[str, Any]) -> Source:
    filled = {key: _substitute(value, language, locale) for key, value in rest.items()}
    try:
        source = Source(**filled, name=f"{language}.{name}", language=language)
    except ValidationError as error:
        raise BadRequest(f"corpus recipe: source {name}: {faults(error)}") from error
    _check_keys(name, source)
    return source


def _check_keys(name: str, source: Source) -> None:
    """Refuse a source that lacks a key of its kind or format, or has a key that these do not read."""
    packages, folder = source.kind in ("deb", "pypi"), source.kind == "folder"
    for key, read in {"packages": packages, "folder": folder, "files": packages or folder}.items():
        if bool(getattr(source, key)) != read:
            raise BadRequest(
                f"corpus recipe: source {name} of kind {source.kind!r} {'needs' if read else 'takes no'} {key}"
            )
    for key, formats in READERS_OF.items():
        if getattr(source, key) and source.format not in formats:
            raise BadRequest(f"corpus recipe: source {name} of format {source.format!r} takes no {key}")
    if source.format in READERS_OF["field"] and not source.field:
        raise BadRequest(f"corpus recipe: source {name} of format {source.format!r} needs field")
    if source.format == "csv" and not all(column.isdecimal() for column in (source.field, *source.document)):
        raise BadRequest(f"corpus recipe: source {name}: a column of csv is a number, from 0")
    for key in ("match", "strip"):
        try:
            groups = re.compile(getattr(source, key)).groups
        except re.error as error:
            raise BadRequest(f"corpus recipe: source {name}: {key} is no regular expression: {error}") from error
        if key == "match" and source.match and not groups:
            raise BadRequest(f"corpus recipe: source {name}: match has no group, which would be a paragraph")
    if not source.licence and not folder:
        raise BadRequest(f"corpus recipe: source {name} of kind {source.kind!r} needs its licence")
    if (source.format == "ddtp") != (source.kind == "ddtp"):
        raise BadRequest(f"corpus recipe: source {name} of kind {source.kind!r} needs its format")


def _substitute(value: Any, language: str, locale: str) -> Any:
    """Replace `{lang}` (hu) and `{locale}` (hu_HU), and turn lists into tuples."""
    if isinstance(value, list):
        return tuple(_substitute(item, language, locale) for item in value)
    if isinstance(value, str):
        return value.replace("{lang}", language).replace("{locale}", locale)
    return value
