"""The gradient steps of a run: `transformers.Trainer` on batches that depend on the step alone."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)

from nr_serve.errors import NrError
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train.export import load_weights
from nr_serve.train.learner import Learner
from nr_serve.train.mix import Classes, Mix
from nr_serve.train.recipe import BadRecipe, Run


class TrainingDiverged(NrError):
    """The loss is no longer a number; the last checkpoint is from before."""


class TrainingStopped(NrError):
    """Training could not go on, and the last good checkpoint is kept."""


def learning_rate(run: Run, step: int) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then the recipe's schedule."""
    tokens = (step + 1) * run.batch_tokens
    if tokens < run.warmup_tokens:
        return run.lr * tokens / run.warmup_tokens
    if tokens <= run.decay_start:
        return run.lr
    left = (run.tokens - tokens) / max(1, run.tokens - run.decay_start)
    left = min(1.0, max(0.0, left))
    return run.lr * (0.5 - 0.5 * math.cos(math.pi * left) if run.schedule == "cosine" else left)


class Log:
    """A run's log: one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, entry: Mapping[str, Any]) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


class Batches(Dataset[dict[str, tuple[Tensor, Tensor]]]):
    """The parts of all steps, in order: each step is cut in as many parts as processes and accumulation need."""

    def __init__(self, classes: Classes, run: Run, processes: int) -> None:
        parts = processes * run.accumulate
        if run.windows_a_step % parts:
            raise BadRecipe(f"{run.windows_a_step} windows a step do not divide into {parts} parts")
        self.parts, self.length = parts, run.steps * parts
        self.mix = Mix(classes, run)
        if self.mix.fewest_targets < parts:
            raise BadRecipe(
                f"a step may have {self.mix.fewest_targets} target windows, too few for its {parts} parts"
            )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, tuple[Tensor, Tensor]]:
        step, part = divmod(i, self.parts)
        named = zip(("target", "original", "background"), self.mix.batch(step), strict=True)
        own = {name: w.take(slice(part, None, self.parts)) for name, w in named if w is not None}
        return {name: (w.ids_NT, w.offset_NT) for name, w in own.items() if len(w)}


def training_arguments(run: Run, out: Path, *, tensorboard: bool) -> TrainingArguments:
    """The recipe's steps in the words of `transformers.Trainer`."""
    stops = run.patience is not None
    save, validate = run.every(run.checkpoint_every), run.every(run.validate_every)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=run.steps,
        per_device_train_batch_size=1,  # a part of a step: see Batches
        gradient_accumulation_steps=run.accumulate,
        max_grad_norm=run.clip,
        bf16=run.dtype == "bfloat16",
        torch_compile=run.compile,
        ddp_find_unused_parameters=True,  # a block whose gate stayed shut takes no part in a step
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=validate if stops else save,  # the best checkpoint is one that was measured
        save_total_limit=None,  # checkpoints go when a newer one is complete: see Loop
        eval_strategy="steps",
        eval_steps=validate,
        load_best_model_at_end=stops,
        metric_for_best_model="loss" if stops else None,
        greater_is_better=False if stops else None,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=["tensorboard"] if tensorboard else [],
        seed=run.seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs: one process each, never DataParallel
    return arguments


class Loop(transformers.Trainer):
    """The gradient steps of a run."""

    def __init__(
        self,
        learner: Learner,
        classes: Classes,
        plan: Run,
        arguments: TrainingArguments,
        *,
        validate: Callable[[int], float],
        describe: Callable[[Path, int], checkpoints.Checkpoint],
        log: Log,
    ) -> None:
        """`validate` measures after so many steps, `describe` says what a checkpoint then in a folder is."""
        self.learner, self.plan, self.validate, self.describe, self.lines = learner, plan, validate, describe, log
        self.out = Path(str(arguments.output_dir))
        parameters = list(self.learner.trained().values())
        optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay, foreach=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(plan, step) / plan.lr)
        self.batches = Batches(classes, plan, arguments.world_size)
        callbacks: list[TrainerCallback] = [EarlyStoppingCallback(plan.patience)] if plan.patience else []
        super().__init__(
            model=self.learner,
            args=arguments,
            train_dataset=self.batches,
            eval_dataset=[],  # measured by the run, in its own way
            data_collator=lambda parts: parts[0],
            optimizers=(optimizer, schedule),
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)  # it and the plain bar print every log line on stdout
        self.pop_callback(ProgressCallback)
        self.add_callback(Bar())
        self._sums: dict[str, float] = {}
        self._parts, self._since, self._logged_step = 0, time.monotonic(), 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.batches)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The learner's loss on one part of a step. Raises TrainingDiverged if it is not finite."""
        if self._parts == 0:  # the first since the last line of the log: measuring takes no part in the rate
            self._since, self._logged_step = time.monotonic(), self.state.global_step
        output = model(**inputs)
        for name in ("lm", "local", "target_fired", "other_fired"):
            self._sums[name] = self._sums.get(name, 0.0) + float(output[name])
        self._parts += 1
        self._check(output["loss"], "loss")
        return (output["loss"], output) if return_outputs else output["loss"]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm: Tensor = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        self._check(norm, "gradient norm")
        return norm

    def _check(self, value: Tensor, what: str) -> None:
        value = value.detach()
        if not math.isfinite(float(value)):
            self.lines.write({"event": "diverged", "step": self.state.global_step, what: float(value)})
            raise TrainingDiverged(
                f"step {self.state.global_step}: the {what} is {float(value)}; "
                f"the last good checkpoint is {checkpoints.latest(self.out)}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means since the last time, with the rate."""
        if self._parts and "loss" in logs:
            tokens = (self.state.global_step - self._logged_step) * self.plan.batch_tokens
            logs |= {name: total / self._parts for name, total in self._sums.items()}
            logs["tokens_a_second"] = tokens / (time.monotonic() - self._since)
            self._sums, self._parts = {}, 0
            done = self.state.global_step * self.plan.batch_tokens
            if self.is_world_process_zero():
                self.lines.write({"event": "step", "step": self.state.global_step, "tokens": done} | _plain(logs))
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out sources."""
        metrics = {"eval_loss": self.validate(self.state.global_step)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        assert output_dir is not None
        if self.args.should_save:  # one process of all
            checkpoints.save_weights(Path(output_dir), self.learner.trained_state())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # the three ways in which a full disk shows
            kept = checkpoints.latest(self.out)
            where = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
            raise TrainingStopped(f"cannot write a checkpoint in {self.out}: {error}; {where}") from error
        self.accelerator.wait_for_everyone()  # each process has written its random state
        if self.args.should_save:
            step = self.state.global_step
            folder = self.out / f"{checkpoints.PREFIX}{step}"
            checkpoints.complete(self.describe(folder, step))
            best = self.state.best_model_checkpoint
            checkpoints.rotate(self.out, keep=Path(best) if best else None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.learner, checkpoints.load(Path(resume_from_checkpoint)).weights())

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class Bar(ProgressCallback):
    """A progress bar on stderr with the latest losses."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the losses and how much fired."""
        bar: Any = self.training_bar  # None in the other processes
        if bar is not None and "lm" in logs:
            bar.set_postfix_str(
                f"lm {logs['lm']:.3f}, fired {logs['target_fired']:.0%} of target, "
                f"{logs['other_fired']:.2%} of others, {logs['tokens_a_second']:.0f} tokens/s"
            )


def _plain(logs: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in logs.items()}
