"""What the training loop reads: the parts of each step, a function of the step alone."""

from __future__ import annotations

from torch.utils.data import Dataset

from nr_serve.train.learner import Batch, StepCounts
from nr_serve.train.recipe import BadRecipe, Run
from nr_serve.train.text.classes import Classes
from nr_serve.train.text.mix import Mix
from nr_serve.train.text.pack import Windows


class Batches(Dataset[Batch]):
    """The parts of all steps, in order. Each step is divided among all processes and accumulation parts."""

    def __init__(self, classes: Classes, run: Run, processes: int) -> None:
        parts = processes * run.accumulate
        if run.windows_a_step % parts:
            raise BadRecipe(f"{run.windows_a_step} windows per step do not divide into {parts} parts")
        self.parts, self.length = parts, run.steps * parts
        self.mix = Mix(classes, run)
        if run.fewest_targets < parts:
            raise BadRecipe(f"a step may have {run.fewest_targets} target windows, too few for its {parts} parts")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Batch:
        step, part = divmod(i, self.parts)
        roles = zip(("target", "original", "background"), self.mix.batch(step), strict=True)
        windows: dict[str, Windows] = {role: each for role, each in roles if each is not None}
        own = {role: each.take(slice(part, None, self.parts)) for role, each in windows.items()}
        read = {role: (each.ids_NT, each.offset_NT) for role, each in own.items() if len(each)}
        return {"step": StepCounts.of(windows, self.parts), **read}
