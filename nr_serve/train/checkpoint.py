"""Checkpoints of a run: one folder each, seen only when complete, so that a killed run resumes exactly.

The loop (`transformers.Trainer`) writes the optimizer, the schedule and the random states. This module adds the
trained weights, and marks the folder complete by writing `state.json` last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from nr_serve.disk import held, whole, writing
from nr_serve.errors import Conflict, NrError, faults
from nr_serve.train.log import is_log

PREFIX = "checkpoint-"
KEPT = 2
STATE = "state.json"
LOG = "log.jsonl"
"""Name of a run's log in its folder; the log has a line before there is any checkpoint."""
WEIGHTS = "trained.safetensors"
REFITTED = "refitted.safetensors"
REMEDY = "without this file the gates are fitted again when the run is resumed"


class BadCheckpoint(NrError):
    """A checkpoint cannot be read back."""


@dataclass(frozen=True)
class Checkpoint:
    """State of a run when it was saved."""

    folder: Path
    step: Annotated[int, Field(strict=True, ge=0)]
    """Number of gradient steps taken."""
    recipe: dict[str, Any]
    base_contents: str
    """`FrozenBase.contents` of the base that the run trains."""
    text_digest: str
    """`Classes.digest` of the text that the run trained on and measured."""
    results: dict[str, dict[str, float]]
    """The latest measurements on held-out text."""
    start: str | None = None
    """Version of the adapter file that the run started from; None if it started from none, or if unknown."""
    measured_step: int | None = None
    """Number of gradient steps taken when `results` were measured; None if unknown."""
    best_step: int | None = None
    """Step with the lowest loss so far on the target's held-out text; None if the run does not watch it."""
    stopped: bool = False
    """Whether the run has ended early, because that loss has not fallen for too long."""
    digests: dict[str, str] = field(default_factory=dict)
    """Hash of each file, by name; empty until the checkpoint is complete."""

    def may_have_started_from(self, version: str | None) -> bool:
        """Whether the run started from this version of its adapter file, as far as both are known."""
        return None in (version, self.start) or version == self.start

    def check(self) -> None:
        """Raise BadCheckpoint, naming the file, if one that a resumed run reads is not as it was written."""
        for name in self.digests:
            if name != REFITTED:  # which may be removed, and is checked where it is read
                self._check(name)

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors, by the learner's names. Raises BadCheckpoint."""
        return self._tensors(WEIGHTS)

    @property
    def is_refitted(self) -> bool:
        """Whether gates were fitted again after the run's last step."""
        return REFITTED in self.digests and (self.folder / REFITTED).exists()

    def final(self) -> dict[str, Tensor]:
        """The tensors for the run's adapter file: the trained ones, with refitted gates in place of the gates.

        Raises BadCheckpoint.
        """
        return self.weights() | (self._tensors(REFITTED) if self.is_refitted else {})

    def keep_refitted(self, gates: Mapping[str, Tensor]) -> None:
        """Keep refitted gates in a separate file: a longer run may still continue from the trained tensors."""
        path = self.folder / REFITTED
        with writing(path), whole(path) as part:
            _save(part, gates)
            _sync(part)
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            _write_state(self.folder, state | {"digests": {**self.digests, REFITTED: _digest(part)}})

    def _tensors(self, name: str) -> dict[str, Tensor]:
        self._check(name)
        try:
            return safetensors.torch.load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise self._bad(name, error) from error

    def _check(self, name: str) -> None:
        try:
            changed = _digest(self.folder / name) != self.digests.get(name)
        except OSError as error:
            raise self._bad(name, error) from error
        if changed:
            raise self._bad(name, "it is not as it was written")

    def _bad(self, name: str, fault: object) -> BadCheckpoint:
        remedy = f"; {REMEDY}" if name == REFITTED else ""
        return BadCheckpoint(f"cannot read {self.folder / name} of the checkpoint: {fault}{remedy}")


_CHECKPOINT = TypeAdapter(Checkpoint)


def odd_one(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first name whose tensor is missing on one side or differs in shape; None if all match."""
    shapes = [{(name, tensor.shape) for name, tensor in tensors.items()} for tensors in (found, expected)]
    return min((name for name, _ in shapes[0] ^ shapes[1]), default=None)


def save_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the trained tensors of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / WEIGHTS, weights)


def at_step(out: Path, step: int) -> Path:
    """Folder of the checkpoint of a step of the run in `out`."""
    return out / f"{PREFIX}{step}"


def complete(checkpoint: Checkpoint) -> None:
    """Mark a checkpoint complete, once all else is written: from now on a resumed run starts from it."""
    folder = checkpoint.folder
    files = [path for path in folder.iterdir() if path.is_file() and path.name != STATE]
    for path in files:
        _sync(path)
    state = {name: value for name, value in vars(checkpoint).items() if name != "folder"}
    state["digests"] = {path.name: _digest(path) for path in files}
    _write_state(folder, state)


def rotate(out: Path, keep: int | None = None) -> None:
    """Remove all complete checkpoints except the newest two and that of step `keep`.

    `state.json` is removed first, so that a killed removal leaves an incomplete checkpoint.
    """
    for folder in _complete(out)[:-KEPT]:
        if _step(folder) != keep:
            (folder / STATE).unlink()
            shutil.rmtree(folder)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Lock the run in `out`, and remove checkpoints that a killed process left incomplete.

    Raises Conflict if another process has the lock (a killed process frees it), or if there are incomplete
    checkpoints but no log of a run: then they belong to something else, such as a plain `transformers.Trainer`.
    """
    with held(out, "trains in"):
        torn = sorted(set(_own(out)) - set(_complete(out)))
        if torn and not ((out / LOG).exists() and is_log(out / LOG)):
            raise Conflict(f"{torn[0]} is not of a run of nr-serve; name another folder")
        for folder in torn:
            shutil.rmtree(folder)
        yield


def latest(out: Path) -> Path | None:
    """The newest complete checkpoint in `out`; None if there is none."""
    folders = _complete(out)
    return folders[-1] if folders else None


def kept(out: Path) -> Checkpoint | None:
    """The checkpoint whose weights the run in `out` currently keeps: the best measured one, else the newest.

    Raises BadCheckpoint.
    """
    newest = latest(out)
    saved = None if newest is None else load(newest)
    if saved is None or saved.best_step is None or saved.best_step == saved.step:
        return saved
    return load(at_step(out, saved.best_step))


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint's state. Raises BadCheckpoint, naming the folder."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if "digests" not in state:
            raise ValueError(f"{STATE} holds no hashes; an earlier version wrote it")
        return _CHECKPOINT.validate_python({"folder": folder, **state})
    except ValidationError as error:
        raise BadCheckpoint(f"cannot read the checkpoint {folder}: in {STATE} {faults(error)}") from error
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadCheckpoint(f"cannot read the checkpoint {folder}: {error}") from error


def _complete(out: Path) -> list[Path]:
    return sorted((folder for folder in _own(out) if (folder / STATE).is_file()), key=_step)


def _own(out: Path) -> list[Path]:
    """Folders named like a run's checkpoints (not, say, `checkpoint-8.bak`). Raises BadCheckpoint."""
    try:
        found = [path for path in out.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]
        return [path for path in found if path.is_dir()]
    except OSError as error:
        raise BadCheckpoint(f"cannot look for checkpoints in {out}: {error.strerror}") from error


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    with whole(folder / STATE) as part:
        part.write_text(json.dumps(state, indent=1), encoding="utf-8")
        _sync(part)
    _sync(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    safetensors.torch.save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
    path.chmod(0o644)  # like the files beside it: the library makes it readable by its owner only


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
