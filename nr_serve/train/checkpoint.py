"""Checkpoints of a run: a folder each, whole or not there, so that a killed run goes on exactly where it was.

A checkpoint holds `blocks.safetensors`, `optimizer.pt` (tensors and numbers only, read with `weights_only`) and
`state.json`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nr_serve.errors import Conflict, NrError

PREFIX = "checkpoint-"
KEPT = 2


class BadCheckpoint(NrError):
    """A checkpoint that cannot be read back."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything the loop needs to go on."""

    step: int
    """Gradient steps taken."""
    recipe: dict[str, Any]
    base_fingerprint: str
    text_digest: str
    """`text.Classes.digest` of the text it trained on."""
    results: dict[str, Any]
    """The last measurement on held-out text."""
    blocks: dict[str, Tensor]
    """The adapter module's state dict."""
    optimizer: dict[str, Any]


def save(out: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below `out` and remove all but the newest two."""
    for torn in out.glob(f".{PREFIX}*.part"):  # a killed run's; `alone` keeps living ones out
        shutil.rmtree(torn)
    part = out / f".{PREFIX}{checkpoint.step:08d}.part"
    part.mkdir(parents=True)
    safetensors.torch.save_file(checkpoint.blocks, part / "blocks.safetensors")
    torch.save(checkpoint.optimizer, part / "optimizer.pt")
    state = {
        "step": checkpoint.step,
        "recipe": checkpoint.recipe,
        "base_fingerprint": checkpoint.base_fingerprint,
        "text_digest": checkpoint.text_digest,
        "results": checkpoint.results,
    }
    (part / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for path in part.iterdir():
        _sync(path)
    final = out / f"{PREFIX}{checkpoint.step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    _sync(out)
    for old in _folders(out)[:-KEPT]:
        shutil.rmtree(old)
    return final


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the run in `out`; raises Conflict if another process holds it. A killed process lets go."""
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"another process trains in {out}") from error
        yield


def latest(out: Path) -> Path | None:
    """The newest checkpoint below `out`, if there is one."""
    folders = _folders(out)
    return folders[-1] if folders else None


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint. Raises BadCheckpoint, naming the folder."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return Checkpoint(
            **state,
            blocks=safetensors.torch.load_file(folder / "blocks.safetensors"),
            optimizer=torch.load(folder / "optimizer.pt", weights_only=True),
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise BadCheckpoint(f"cannot read the checkpoint {folder}: {error}") from error


def _folders(out: Path) -> list[Path]:
    return sorted(out.glob(f"{PREFIX}*")) if out.is_dir() else []


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
