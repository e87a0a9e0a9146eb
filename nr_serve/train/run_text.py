"""The text of a run, read and checked before its base is loaded: that needs the base's tokenizer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nr_serve.train import processes, text
from nr_serve.train.batches import Batches
from nr_serve.train.frozen_base import check_window, load_hf_tokenizer
from nr_serve.train.recipe import BadRecipe, Recipe
from nr_serve.train.text.classes import Classes
from nr_serve.train.text.pack import Windows
from nr_serve.train.text.read import find_roles
from nr_serve.train.text.sources import Source

_NAMED = 8  # most target sources to name in a message


@dataclass(frozen=True)
class RunText:
    """The text that a run reads."""

    classes: Classes
    heldout: Mapping[str, Windows]
    batches: Batches
    """The classes' windows, in the order of the steps."""

    @property
    def digest(self) -> str:
        """Identifies the text trained on and measured."""
        return self.classes.digest(self.heldout)


def read_run_text(recipe: Recipe, corpus: Path) -> RunText:
    """The text that a recipe names, as tokens of its base.

    Raises BadRecipe for text that is missing, empty, damaged or has two roles, for a target whose text is also
    another class's, and for a recipe that does not suit this text; DownloadFailed; UnsupportedBase without a
    tokenizer.
    """
    data, run = recipe.data, recipe.run
    roles = find_roles(corpus, data)  # missing text is reported before a base is fetched for its tokenizer
    target = [str(source) for source in roles["target"]]
    more = f" and {len(target) - _NAMED} more" if len(target) > _NAMED else ""
    processes.say("train", f"the target's text: {', '.join(target[:_NAMED])}{more}")
    _tell_of_own_language(roles)
    check_window(recipe.base, run.window, "run.window")
    tokenizer = load_hf_tokenizer(recipe.base)
    classes = text.read_classes(corpus, data, tokenizer, run)
    batches = Batches(classes, recipe.plan, processes.count())
    heldout = text.read_heldout(
        corpus,
        data.heldout,
        tokenizer,
        run.window,
        run.validate_windows,
        text_field=data.text_field,
        apart_from=classes,
    )
    if run.patience is not None and not any(recipe.owns(name) for name in heldout):
        raise BadRecipe("run.patience watches the target's held-out text, and data.heldout names none")
    return RunText(classes, heldout, batches)


def _tell_of_own_language(roles: Mapping[str, Sequence[Source]]) -> None:
    """Warn of background text in a language of the target; a domain within a language may be meant."""
    target, background = ({source.language for source in roles[role]} for role in ("target", "background"))
    for language in sorted(target & background):
        processes.say(
            "train",
            f"warning: data.background holds text of {language}, the target's own language: the gates are fitted "
            "to stay shut on it; take it out unless that is meant",
        )
