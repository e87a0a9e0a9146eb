"""A recipe small enough to train in a second, and what its runs leave."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nr_serve.train import checkpoint as checkpoints
from nr_serve.train import trainer
from nr_serve.train.recipe import Recipe
from nr_serve.train.recipe_file import read_recipe

RECIPE = """
base = "{base}"
domain = "hu"
[data]
target = ["hu.*.train.txt"]
original = ["en.*.train.txt"]
background = ["da.*.train.txt"]
heldout = ["*.heldout.txt"]
[blocks]
h = 16
[gate]
percentile = 90
fit_tokens = 512
threshold = 0.0
{gate}
[run]
tokens = {tokens}
window = 16
batch_tokens = 128
original_share = 0.125
background_share = 0.125
lr = {lr}
warmup_tokens = 256
checkpoint_every = 256
validate_every = 512
log_every = 1
"""


def write_recipe(
    folder: Path, base: Path, *, tokens: int = 1280, lr: float = 0.01, gate: str = "", **changes: Any
) -> Recipe:
    """The recipe on that base; a change is a key with `__` for the dot, such as `run__seed=3`."""
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(base=base, tokens=tokens, lr=lr, gate=gate))
    return read_recipe(path, {key.replace("__", "."): value for key, value in changes.items()})


def write_sweep(folder: Path, base: Path, runs: str) -> Path:
    """A sweep over that recipe, all its runs with a seed of 3; `runs` is the rest of its file."""
    (folder / "recipe.toml").write_text(RECIPE.format(base=base, tokens=512, lr=0.01, gate=""))
    path = folder / "sweep.toml"
    path.write_text(f'recipe = "recipe.toml"\n[set]\n"run.seed" = 3\n{runs}')
    return path


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The trained tensors of a run's newest checkpoint."""
    return checkpoints.load(checkpoints.latest(out)).weights()


@contextmanager
def killed_before(step: int, monkeypatch) -> Iterator[None]:
    """A run inside ends with KeyboardInterrupt once it has taken so many steps."""
    loss = trainer.RunTrainer.compute_loss

    def killed(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.RunTrainer, "compute_loss", killed)
        yield
