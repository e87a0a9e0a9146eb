"""The order in which a run reads its windows.

Nothing depends on a run's progress: a batch is a function of the recipe, the text and the step.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from nr_serve.train.recipe import BadRecipe, Run
from nr_serve.train.text.classes import Classes
from nr_serve.train.text.pack import Windows, join


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
