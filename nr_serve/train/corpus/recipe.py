"""The corpus recipe: a TOML file that says where text comes from."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nr_serve.errors import BadRequest

KINDS = ("deb", "pypi", "ddtp")
FORMATS = ("html", "mallard", "man", "mo", "text", "fortune", "jsonl", "csv", "ddtp")


@dataclass(frozen=True)
class Source:
    """One text source in one language; `{lang}` in the strings of the TOML table is already filled in."""

    name: str  # "hu.lohelp": the language and the table's name
    language: str
    kind: str  # "deb" and "pypi": files in packages; "ddtp": apt's lists of translated package descriptions
    licence: str
    format: str = "ddtp"
    packages: tuple[str, ...] = ()
    files: tuple[str, ...] = ()  # globs below the unpacked packages
    original: tuple[str, ...] = ()  # globs of the English originals: what a translation left as it was is dropped
    field: str = ""  # what holds the text: a name (jsonl) or a column, from 0 (csv)
    document: tuple[str, ...] = ()  # csv: the columns, from 0, that say which document a row belongs to
    match: str = ""  # text: a regular expression whose first group is a paragraph
    strip: str = ""  # a regular expression to cut out of every paragraph
    limit_mb: float = 3.0  # text kept, in 10**6 characters, taken evenly from the whole source

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON holds them, to be kept in the manifest and compared."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def read_recipe(path: Path) -> list[Source]:
    """Return the sources of the recipe at `path`; raise `BadRequest` naming what is wrong with it."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("source", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BadRequest(f"corpus recipe {path}: {error}") from error
    sources = [source for table in tables for source in _expand(table)]
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not sources or twice:
        raise BadRequest(f"corpus recipe {path}: " + (f"{', '.join(twice)} named twice" if twice else "no sources"))
    return sources


def _expand(table: dict[str, Any]) -> list[Source]:
    """Make one source for each language of a table."""
    name, languages = table.get("name"), table.get("languages")
    if not name or not languages:
        raise BadRequest(f"corpus recipe: a source lacks its name or its languages: {table}")
    rest = {key: value for key, value in table.items() if key not in ("name", "languages", "locales")}
    unknown = sorted(set(rest) - {field.name for field in fields(Source)})
    if unknown:
        raise BadRequest(f"corpus recipe: source {name} has unknown keys: {', '.join(unknown)}")
    locales = table.get("locales", {})
    return [_fill(name, language, locales.get(language, language), rest) for language in languages]


def _fill(name: str, language: str, locale: str, rest: dict[str, Any]) -> Source:
    filled = {key: _substitute(value, language, locale) for key, value in rest.items()}
    try:
        source = Source(name=f"{language}.{name}", language=language, **filled)
    except TypeError as error:
        raise BadRequest(f"corpus recipe: source {name}: {error}") from error
    if source.kind not in KINDS or source.format not in FORMATS:
        raise BadRequest(f"corpus recipe: source {name}: unknown kind {source.kind!r} or format {source.format!r}")
    return source


def _substitute(value: Any, language: str, locale: str) -> Any:
    """Fill in `{lang}` (hu) and `{locale}` (hu_HU), and make lists tuples."""
    if isinstance(value, list):
        return tuple(_substitute(item, language, locale) for item in value)
    if isinstance(value, str):
        return value.replace("{lang}", language).replace("{locale}", locale)
    return value
