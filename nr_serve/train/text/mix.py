"""The order in which a run reads its windows.

Nothing depends on a run's progress: a batch is a function of the recipe, the text and the step.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nr_serve.train.digest import digest
from nr_serve.train.recipe import BadRecipe, Run
from nr_serve.train.text.frames import Frames
from nr_serve.train.text.pack import Windows, join

CHAT = "chat"
"""The class of original text in the base's chat template."""


@dataclass(frozen=True)
class Classes:
    """Windows by role and class. A class's name is a source (`en.fortunes`) or a language."""

    target: Windows
    original: Mapping[str, Windows]
    background: Mapping[str, Windows]
    grams: Mapping[str, Tensor] = field(default_factory=dict)
    """The 8-grams of each class's text (see `overlap`), including `target`, int64 [G]."""
    frames: Frames = field(default_factory=Frames)
    """What the base's tokenizer puts around text; without a chat if the recipe has `chat = false`."""

    def digest(self, heldout: Mapping[str, Windows] | None = None) -> str:
        """16 hex digits that identify this text, its documents and each class's role.

        The text `heldout`, which is measured during the run, is included.
        """
        roles = {
            "target": {"target": self.target},
            "original": self.original,
            "background": self.background,
            "heldout": heldout or {},
        }
        content = [
            [role, name, digest((windows.ids_NT, windows.offset_NT)), *windows.ids_NT.shape]
            for role, classes in roles.items()
            for name, windows in classes.items()
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class Rotation:
    """An endless, seeded order over the windows of several classes: the classes in turn, reshuffled every epoch."""

    def __init__(self, classes: Iterable[Windows], seed: int) -> None:
        self.classes = list(classes)
        self.seed = seed
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def at(self, i: int) -> Windows:
        """The i-th window of the order, [1, T]."""
        turn, which = divmod(i, len(self.classes))
        windows = self.classes[which]
        epoch, row = divmod(turn, len(windows))
        if self._orders.get(which, (-1, []))[0] != epoch:
            order = list(range(len(windows)))
            random.Random(f"{self.seed}.{which}.{epoch}").shuffle(order)
            self._orders[which] = (epoch, order)
        return windows.take([self._orders[which][1][row]])


class Mix:
    """What each step reads: target, original and background windows whose shares hold over the run.

    Raises BadRecipe if background text has a share but there is none.
    """

    def __init__(self, classes: Classes, run: Run) -> None:
        if run.background_share and not classes.background:
            raise BadRecipe(f"run.background_share is {run.background_share}, but data.background names no text")
        self.run = run
        self.target = Rotation([classes.target], run.seed)
        self.original = Rotation(classes.original.values(), run.seed)
        self.background = Rotation(classes.background.values(), run.seed)

    def batch(self, step: int) -> tuple[Windows, Windows | None, Windows | None]:
        """Target, original and background windows of step 0, 1, ...; None for a role the step does not read."""
        before, after = self._taken(step), self._taken(step + 1)
        target, original, background = (
            [rotation.at(i) for i in range(first, last)]
            for rotation, first, last in zip(
                (self.target, self.original, self.background), before, after, strict=True
            )
        )
        return join(target), join(original) if original else None, join(background) if background else None

    def _taken(self, steps: int) -> tuple[int, int, int]:
        """Numbers of target, original and background windows that the first `steps` steps read."""
        windows = steps * self.run.windows_a_step
        original = int(windows * self.run.original_share + 1e-9)
        background = int(windows * self.run.background_share + 1e-9)
        return windows - original - background, original, background
