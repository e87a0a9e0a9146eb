"""What a source of text is to the adapters measured on it: their own, the base's, one they have seen, or new."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nr_serve.errors import BadAdapterFile, BadRequest
from nr_serve.logs import say
from nr_serve.neutral.format import Adapter, AdapterInfo
from nr_serve.train.entries import language_of, names_language, names_source, names_text
from nr_serve.train.text.sources import Source

Kind = Literal["own", "near", "original", "seen", "unseen"]

ORIGINAL = ("en.*",)
"""Globs of text in the base's language, used where no recipe names any."""


@dataclass(frozen=True)
class Role:
    """What a source of text is to the adapters."""

    kind: Kind
    """own: an adapter learned it; near: its language is a close relative of one that an adapter learned; original:
    it is in the base's own language; seen: its language is in some recipe; unseen: its language is in no
    recipe."""
    own: tuple[str, ...] = ()
    """The adapters that learned it."""
    near: tuple[str, ...] = ()
    """The adapters that learned a close relative of its language."""
    original: bool = False
    """Whether the source is in the base's own language; this can be true of text that an adapter learned too."""


@dataclass(frozen=True)
class RecipeText:
    """The entries by which an adapter's recipe names its text."""

    target: tuple[str, ...]
    original: tuple[str, ...] = ()
    background: tuple[str, ...] = ()

    def parts(self) -> tuple[tuple[str, ...], ...]:
        """The entries of each role."""
        return self.target, self.original, self.background


def warn_of_learned(sources: Iterable[Source], texts: Iterable[RecipeText]) -> None:
    """Say which sources the recipes train on: losses on these do not tell how well other text would be read."""
    parts = [part for text in texts for part in text.parts()]
    names = [str(source) for source in sources if not source.held_out]  # nothing trains on held-out text
    learned = [name for name in names if any(names_text(part, name) for part in parts)]
    if learned:
        say("evaluate", f"warning: not held out, but trained on: {', '.join(learned)}")


def recipe_text(info: AdapterInfo) -> RecipeText:
    """The text that an adapter's recipe names; for a file without a recipe, all text in its domain's language.

    Raises BadAdapterFile for a recipe whose data are not lists of sources.
    """
    if "data" not in info.recipe:
        return RecipeText((f"{info.domain}.*",))
    data = info.recipe["data"]
    parts = ("target", "original", "background")
    if not isinstance(data, Mapping) or not all(_is_sources(data.get(part, [])) for part in parts):
        raise BadAdapterFile(f"the recipe of {info.domain!r}: its data are not lists of sources")
    return RecipeText(*(tuple(data.get(part, [])) for part in parts))


def assign_roles(
    sources: Iterable[str], adapters: Mapping[str, Adapter], near: Mapping[str, Sequence[str]]
) -> dict[str, Role]:
    """The role of each source. `near` names, for a language, its close relatives.

    Raises BadRequest for a relative that no adapter learned, or for a language without text here.
    """
    listed = list(sources)
    texts = {name: recipe_text(adapter.info) for name, adapter in adapters.items()}
    relatives = {language: _relatives(language, of, texts) for language, of in near.items()}
    absent = sorted(set(near) - {language_of(source) for source in listed})
    if absent:
        raise BadRequest(f"no source measured is of the language {', '.join(absent)}", param="near")
    original = [text.original for text in texts.values() if text.original] or [ORIGINAL]
    return {source: _role(source, texts, relatives, original) for source in listed}


def _role(
    source: str,
    texts: Mapping[str, RecipeText],
    relatives: Mapping[str, tuple[str, ...]],
    original: Sequence[Sequence[str]],
) -> Role:
    language = language_of(source)
    own = tuple(name for name, text in texts.items() if names_source(text.target, source))
    near = relatives.get(language, ())
    is_original = any(names_language(entries, language) for entries in original)
    seen = any(names_language(part, language) for text in texts.values() for part in text.parts())
    kinds: dict[Kind, bool] = {"own": bool(own), "near": bool(near), "original": is_original, "seen": seen}
    kind: Kind = next((kind for kind, applies in kinds.items() if applies), "unseen")
    return Role(kind, own, near, is_original)


def _relatives(language: str, of: Sequence[str], texts: Mapping[str, RecipeText]) -> tuple[str, ...]:
    learned = {
        relative: [name for name, text in texts.items() if names_language(text.target, relative)] for relative in of
    }
    for relative, names in learned.items():
        if not names:
            raise BadRequest(f"{language} is near {relative}, but no adapter here learned {relative}", param="near")
    return tuple(name for name in texts if any(name in names for names in learned.values()))


def _is_sources(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
