"""Training: a recipe and a corpus in, an adapter file out. The loop itself is `transformers.Trainer`.

A run is a function of its recipe, corpus and base: a batch depends on the step alone, so a resumed run takes
exactly the steps that an uninterrupted one takes.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from nr_serve.default_model import cache_folder
from nr_serve.errors import Conflict
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train import text
from nr_serve.train.attach import AdapterModule
from nr_serve.train.base import FrozenBase, load_base
from nr_serve.train.export import load_weights, write_result
from nr_serve.train.gates import fit_gates, gate_classes
from nr_serve.train.loop import Log, Loop, TrainingStopped, training_arguments
from nr_serve.train.measure import measure
from nr_serve.train.methods import make_learner
from nr_serve.train.recipe import BadRecipe, Recipe, parse_recipe
from nr_serve.train.tensor_cache import TensorCache

GATE_FORMAT = 1
"""Raised when the fit changes: gates kept by another format are not taken."""


def train(recipe: Recipe, out: Path, corpus: Path, *, resume: bool = False, tensorboard: bool = False) -> Path:
    """Train as `recipe` says, on the text in `corpus`; returns what came of it.

    That is a file, `out`/<domain>.safetensors, for a method with blocks, else a folder, `out`/<method>. `out` also
    receives checkpoints and `log.jsonl`, and with `tensorboard` its event files. Processes started by
    `accelerate launch` share each step. Raises BadRecipe; Conflict if `out` holds another run or another process
    trains there; TrainingDiverged if the loss stops being finite; TrainingStopped if the disk is full.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        with checkpoints.alone(out) if first else nullcontext():
            found = checkpoints.latest(out)
            if found is not None and not resume:
                raise Conflict(f"{out} holds checkpoints of an earlier run; resume it or name another folder")
            saved = None if found is None else checkpoints.load(found)
            run = TrainingRun(recipe, load_base(recipe.base, recipe.base_dtype), out, corpus, saved)
            return run.train(tensorboard=tensorboard)
    except OSError as error:
        raise TrainingStopped(f"training in {out}: {error}") from error


class TrainingRun:
    """One run: its text, its learner, and what it has measured."""

    def __init__(
        self, recipe: Recipe, base: FrozenBase, out: Path, corpus: Path, saved: checkpoints.Checkpoint | None
    ) -> None:
        self.recipe, self.base, self.out, self.saved = recipe, base, out, saved
        run = recipe.run
        _say("reading and packing the text")
        self.classes = text.read_classes(corpus, recipe.data, base.tokenizer, run)
        self.digest = self.classes.digest()
        self.heldout = text.read_heldout(
            corpus,
            recipe.data.heldout,
            base.tokenizer,
            run.window,
            run.validate_windows,
            text_field=recipe.data.text_field,
            apart_from=self.classes,
        )
        if run.patience is not None and not any(recipe.owns(name) for name in self.heldout):
            raise BadRecipe("run.patience watches the target's held-out text, and data.heldout names none")
        if saved is not None:
            self._check_resumable(saved)
        self.learner = make_learner(recipe, base)
        self.results: dict[str, Any] = saved.results if saved else {}
        self.log = Log(out / "log.jsonl")
        self._measured: int | None = None

    def _check_resumable(self, saved: checkpoints.Checkpoint) -> None:
        if not self.recipe.continues(parse_recipe(saved.recipe), saved.step * self.recipe.run.batch_tokens):
            raise Conflict("the recipe differs from that of the run to resume")
        if saved.base_fingerprint != self.base.fingerprint:
            raise Conflict("the base differs from that of the run to resume")
        if saved.text_digest != self.digest:
            raise Conflict("the corpus differs from that of the run to resume")

    def train(self, *, tensorboard: bool) -> Path:
        """Take the steps that are left; returns the adapter file or the folder of the trained model."""
        arguments = training_arguments(self.recipe.run, self.out, tensorboard=tensorboard)
        self.learner.to(arguments.device)
        if self.saved is None:
            if self.recipe.method == "neutral" and self.recipe.gate.fitted:
                self.fit_gates()
        else:
            load_weights(self.learner, self.saved.weights())
            _say(f"resuming after step {self.saved.step}")
        loop = Loop(
            self.learner,
            self.classes,
            self.recipe.run,
            arguments,
            validate=self.validate,
            describe=self._describe,
            log=self.log,
        )
        if self.saved is None:
            self.validate(0)
        loop.train(resume_from_checkpoint=None if self.saved is None else str(self.saved.folder))
        if not loop.is_world_process_zero():
            return self.out
        steps = loop.state.global_step
        if self.recipe.run.patience is not None or self._measured != steps:
            self.validate(steps)
        results = {"tokens": steps * self.recipe.run.batch_tokens, "heldout": self.results}
        self.log.write({"event": "end", "step": steps, "tokens": results["tokens"]})
        return write_result(self.out, self.recipe, self.base, self.learner, results)

    def fit_gates(self) -> None:
        """Fit the gates on the stream as it is, and log how well; gates fitted before to the same text are kept."""
        adapter = self.learner.adapter
        assert adapter is not None

        def fit() -> dict[str, Tensor]:
            _say("fitting the gates")
            gate = self.recipe.gate
            classes = gate_classes(self.classes, gate.fit_tokens)
            report = fit_gates(
                self.base.model, self.learner.attached, classes, gate, original=self.classes.original
            )
            self.log.write({"event": "gates", "layers": {i: asdict(fit) for i, fit in report.items()}})
            found = sum(fit.found for fit in report.values()) / len(report)
            worst = max(max(fit.misfired.values()) for fit in report.values())
            _say(f"gates find {found:.1%} of the target, misfire on at most {worst:.2%} of a class in a layer")
            return adapter.gates()

        key = [GATE_FORMAT, self._gates_depend_on(adapter)]
        adapter.set_gates(TensorCache(cache_folder() / "gates").get(key, fit))

    def _gates_depend_on(self, adapter: AdapterModule) -> dict[str, Any]:
        """All that decides the fitted gates: a key of the cache."""
        digest = hashlib.sha256()
        for name, windows in gate_classes(self.classes, self.recipe.gate.fit_tokens).items():
            digest.update(f"{name} {list(windows.ids_NT.shape)} ".encode())
            digest.update(windows.ids_NT.numpy().tobytes() + windows.offset_NT.numpy().tobytes())
        return {
            "gate": self.recipe.gate.model_dump(),
            "carry": adapter.carry,
            "layers": sorted(adapter.layers),
            "text": digest.hexdigest(),
            "original": sorted(self.classes.original),
            "base": self.base.fingerprint,
            "dtype": self.recipe.run.dtype,
        }

    def validate(self, step: int) -> float:
        """Measure the held-out sources as they are now and log them; returns the mean loss on the target's."""
        self._measured = step
        for name, source in measure(self.base.model, self.learner.attached, self.heldout).items():
            before = self.results.get(name, {}).get("before", source.loss)
            self.results[name] = {"before": before, "after": source.loss}
            if source.fired:
                self.results[name]["fired"] = source.fired[0]
        self.log.write({"event": "heldout", "step": step, "sources": self.results})
        for name, r in self.results.items():
            fired = f"  fired {r['fired']:.2%}" if "fired" in r else ""
            _say(f"  {name:16} loss {r['before']:.3f} -> {r['after']:.3f}{fired}")
        own = [r["after"] for name, r in self.results.items() if self.recipe.owns(name)]
        return sum(own) / len(own) if own else math.nan

    def _describe(self, folder: Path, step: int) -> checkpoints.Checkpoint:
        return checkpoints.Checkpoint(
            folder=folder,
            step=step,
            recipe=self.recipe.dump(),
            base_fingerprint=self.base.fingerprint,
            text_digest=self.digest,
            results=self.results,
        )


def _say(message: str) -> None:
    print(f"train: {message}", file=sys.stderr, flush=True)
