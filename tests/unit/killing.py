"""A training run that dies as by `kill -9` at a named moment; it must have a process of its own."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nr_serve.train import checkpoint as checkpoints
from nr_serve.train.recipe_file import read_recipe
from nr_serve.train.run import train
from nr_serve.train.trainer import RunTrainer


def die_at(owner: Any, name: str, when: Callable[[int, tuple[Any, ...]], bool]) -> None:
    """Have the process die in place of the call `owner.name` whose number, from 1, and arguments are the ones."""
    real, calls = getattr(owner, name), []

    def watched(*args: Any, **more: Any) -> Any:
        calls.append(args)
        if when(len(calls), args):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)

    setattr(owner, name, watched)


MOMENTS = {
    "in the first step": lambda: die_at(RunTrainer, "compute_loss", lambda number, _: number == 1),
    "in a step": lambda: die_at(RunTrainer, "compute_loss", lambda number, _: number == 6),
    "amid a checkpoint": lambda: die_at(torch, "save", lambda number, _: number == 5),
    "before a checkpoint counts": lambda: die_at(checkpoints, "complete", lambda number, _: number == 3),
    "as an old checkpoint goes": lambda: die_at(
        shutil, "rmtree", lambda _, args: Path(args[0]).name.startswith("checkpoint-")
    ),
    "before the adapter is there": lambda: die_at(
        os, "replace", lambda _, args: Path(args[1]).name == "hu.safetensors"
    ),
}


def train_until(moment: str, recipe: Path, out: Path, corpus: Path) -> None:
    """Train until that moment."""
    MOMENTS[moment]()
    train(read_recipe(recipe), out, corpus)
