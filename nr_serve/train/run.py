"""Training: a recipe and a corpus in, an adapter file out. The loop itself is `transformers.Trainer`.

A run is a function of its recipe, corpus and base, and of the adapter file that it starts from. A batch depends on
the step alone, so a resumed run takes exactly the steps of an uninterrupted one. If several processes share a run,
the first one fits gates, measures, writes files and prints; the others only compute their parts of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainingArguments

from nr_serve.errors import Conflict
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train import processes
from nr_serve.train.export import result_path, write_result
from nr_serve.train.frozen_base import load_base
from nr_serve.train.gate_cache import fit_once
from nr_serve.train.gates import FittedGates, refit_gates
from nr_serve.train.log import Log, is_log
from nr_serve.train.measure import measure
from nr_serve.train.methods import make_learner, start_version
from nr_serve.train.recipe import Recipe
from nr_serve.train.recipe_file import parse_recipe
from nr_serve.train.restore import load_weights
from nr_serve.train.run_text import read_run_text
from nr_serve.train.trainer import RunTrainer, TrainingStopped, diverged, training_arguments

_say = partial(processes.say, "train")


def train(recipe: Recipe, out: Path, corpus: Path, *, resume: bool = False, tensorboard: bool = False) -> Path:
    """Train as `recipe` says, on the text in `corpus`; return the path of the result.

    The result is a file, `out`/<domain>.safetensors, for a method with blocks, else a folder, `out`/<method>.
    `out` also gets checkpoints, `log.jsonl` and, with `tensorboard`, its event files. Processes started by
    `accelerate launch` share each step. Raises BadRecipe; Conflict if `out` holds another run or another process
    trains there; TrainingDiverged if the loss is no longer finite; TrainingStopped or CannotWrite if the disk is
    full.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        processes.join()
        arguments = training_arguments(recipe.run, out, tensorboard=tensorboard)
        with ExitStack() as stack:
            processes.from_first(lambda: stack.enter_context(checkpoints.alone(out)))
            found = checkpoints.latest(out)
            if found is not None and not resume:
                raise Conflict(f"{out} holds checkpoints of an earlier run; resume it or name another folder")
            if found is None:
                processes.from_first(lambda: _check_free(out, recipe))
            if found is None and resume:
                _say(f"there is no checkpoint in {out}: the run starts from the beginning")
            saved = None if found is None else checkpoints.load(found)
            if saved is not None:
                processes.from_first(saved.check)
            return TrainingRun(recipe, arguments, out, corpus, saved).train()
    except OSError as error:
        raise TrainingStopped(f"training in {out}: {error}") from error


class TrainingRun:
    """One run: its text, its learner and its measurements."""

    def __init__(
        self,
        recipe: Recipe,
        arguments: TrainingArguments,
        out: Path,
        corpus: Path,
        saved: checkpoints.Checkpoint | None,
    ) -> None:
        self.recipe, self.arguments, self.out, self.saved = recipe, arguments, out, saved
        if saved is not None:
            _check_same_recipe(recipe, saved)
        run = recipe.run
        if run.tokens != run.steps * run.batch_tokens:
            whole = f"{run.steps:,} steps of {run.batch_tokens:,}"
            _say(f"run.tokens {run.tokens:,} is rounded down to {run.steps * run.batch_tokens:,}, {whole}")
        if recipe.idle:
            why = "gates and blocks come from blocks.start" if recipe.blocks.start else "these gates are not fitted"
            _say(f"{why}, so these keys do nothing: {', '.join(recipe.idle)}")
        _say("reading and packing the text")
        with arguments.main_process_first():  # the others find its results in the caches
            self.text = read_run_text(recipe, corpus)
        self.digest = self.text.digest
        _same("corpus", saved is None or saved.text_digest == self.digest)
        self.base = load_base(recipe.base, recipe.base_dtype, arguments.device)
        _same("base", saved is None or saved.base_contents == self.base.contents)
        self.learner = make_learner(recipe, self.base, restored=saved is not None).to(self.base.device)
        start = processes.from_first(lambda: start_version(recipe))
        if saved is not None and not saved.may_have_started_from(start):
            file = recipe.blocks.start
            raise Conflict(f"the run to resume started from another {file}; it goes on if that is moved away")
        self.start = start if saved is None else saved.start
        self.results: dict[str, Any] = saved.results if saved else {}
        self.log = Log(out / checkpoints.LOG) if processes.is_first() else None
        self._measured = saved.measured_step if saved else None
        """Step at which `results` were measured; None if the weights have changed since, other than by a step."""

    def train(self) -> Path:
        """Take the remaining steps; return the adapter file or the folder of the trained model."""
        if self.saved is None:
            if self.recipe.method == "neutral" and self.recipe.gate.fitted and self.recipe.blocks.start is None:
                self._fit_gates()
            self._validate(0)
        else:
            load_weights(self.learner, self.saved.weights())  # first: a fit may have dropped layers
            _say(f"resuming after step {self.saved.step}")
        if self.saved is None or not self.saved.stopped:
            self._take_steps()
        return processes.from_first(self._finish)

    def _take_steps(self) -> None:
        trainer = RunTrainer(
            self.learner,
            self.text.batches,
            self.recipe.run,
            self.arguments,
            validate=self._validate,
            describe=self._describe,
            log=self._log,
        )
        try:
            trainer.train(resume_from_checkpoint=None if self.saved is None else str(self.saved.folder))
        finally:
            trainer.bar.close()

    def _finish(self) -> Path:
        """Write the run's result, from the weights after its last step or, if it has patience, the best ones."""
        kept = self._take_kept()
        if self.recipe.method == "neutral" and self.recipe.gate.resolved.refit:
            self._refit_gates(kept)
        if self._measured != kept.step:
            self._measure(kept.step)
        tokens = kept.step * self.recipe.run.batch_tokens
        self._log({"event": "end", "step": kept.step, "tokens": tokens})
        results = {"tokens": tokens, "heldout": self.results}
        return write_result(self.out, self.recipe, self.base, self.learner, results)

    def _take_kept(self) -> checkpoints.Checkpoint:
        """Load the weights that the run keeps, and their measurements; until now the learner has the newest."""
        kept = checkpoints.kept(self.out)
        assert kept is not None  # the loop writes a checkpoint after its last step
        if kept.folder != checkpoints.latest(self.out):
            load_weights(self.learner, kept.weights())
            self.results, self._measured = kept.results, kept.measured_step
        return kept

    def _fit_gates(self) -> None:
        """Fit the gates on the current stream, or reuse a fit to the same text; report how well they fit."""
        adapter = self.learner.adapter
        assert adapter is not None

        def fitted() -> FittedGates:
            made = fit_once(self.base, self.learner.attached, self.text.classes, self.recipe)
            self._tell(made, 0)
            return made

        adapter.set_gates(processes.from_first(fitted).gates)

    def _refit_gates(self, kept: checkpoints.Checkpoint) -> None:
        """Fit the gates again on the stream that the trained blocks produce; keep them with the checkpoint."""
        self._measured = None  # no measurement was made with the new gates
        if kept.is_refitted:
            load_weights(self.learner, kept.final())
            return
        _say("fitting the gates again")
        fitted = refit_gates(self.base.model, self.learner.attached, self.text.classes, self.recipe.gate)
        self._tell(fitted, kept.step)
        kept.keep_refitted({f"adapter.{name}": gate for name, gate in fitted.gates.items()})

    def _tell(self, fitted: FittedGates, step: int) -> None:
        layers = {i: asdict(each) for i, each in fitted.report.items()}
        self._log({"event": "gates", "step": step, "layers": layers})
        _say(fitted.summary())

    def _validate(self, step: int) -> float:
        """Measure and log the held-out sources with the current weights; return the target's mean loss."""
        return processes.from_first(lambda: self._measure(step))

    def _measure(self, step: int) -> float:
        self._measured = step
        if self.text.heldout:
            _say("measuring the held-out text")
        for name, source in measure(self.base.model, self.learner.attached, self.text.heldout).items():
            before = self.results.get(name, {}).get("before", source.loss)
            self.results[name] = {"before": before, "after": source.loss}
            if source.fired:
                self.results[name]["fired"] = source.fired[0]
            if not math.isfinite(source.loss):
                self._log({"event": "diverged", "step": step, f"loss on {name}": source.loss})
                raise diverged(self.out, step, f"loss on {name}", source.loss)
        self._log({"event": "heldout", "step": step, "sources": self.results})
        for name, r in self.results.items():
            fired = f"  fired {r['fired']:.2%}" if "fired" in r else ""
            _say(f"  {name:16} loss {r['before']:.3f} -> {r['after']:.3f}{fired}")
        own = [r["after"] for name, r in self.results.items() if self.recipe.owns(name)]
        return fmean(own) if own else math.nan

    def _describe(self, folder: Path, step: int) -> checkpoints.Checkpoint:
        return checkpoints.Checkpoint(
            folder=folder,
            step=step,
            recipe=self.recipe.dump(),
            base_contents=self.base.contents,
            text_digest=self.digest,
            results=self.results,
            start=self.start,
            measured_step=self._measured,
        )

    def _log(self, entry: Mapping[str, Any]) -> None:
        if self.log is not None:
            self.log.write(entry)


def _check_free(out: Path, recipe: Recipe) -> None:
    """Raise Conflict if a new run in `out` would overwrite files that are not a run's."""
    log, result = out / checkpoints.LOG, result_path(out, recipe)
    if log.exists():
        if not is_log(log):
            raise Conflict(f"{log} is not the log of a run; name another folder")
    elif result.exists():
        raise Conflict(f"{result} is not of a run in {out}; name another folder")


def _check_same_recipe(recipe: Recipe, saved: checkpoints.Checkpoint) -> None:
    """Raise Conflict, naming the keys, if the checkpoint's run cannot continue with this recipe."""
    taken = saved.step * recipe.run.batch_tokens
    changed = recipe.changed(parse_recipe(saved.recipe), taken)
    if list(changed) == ["run.tokens"]:
        if taken > recipe.run.tokens:
            why = f"the run to resume has taken {taken:,} already"
            raise Conflict(f"run.tokens cannot be {recipe.run.tokens:,}: {why}; train in another folder")
        why = "the learning rate of the run to resume depends on it by now"
        raise Conflict(f"run.tokens cannot change any more: {why}; train in another folder")
    if changed:
        keys = ", ".join(f"{key} is {there!r} there, {here!r} here" for key, (here, there) in changed.items())
        raise Conflict(f"the recipe, with its --set flags, differs from that of the run to resume: {keys}")


def _same(what: str, same: bool) -> None:
    if not same:
        raise Conflict(f"the {what} differs from that of the run to resume")
