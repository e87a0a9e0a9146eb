"""The gradient steps of a run: `transformers.Trainer` on batches that depend on the step alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)

from nr_serve.disk import is_write_fault
from nr_serve.errors import NrError
from nr_serve.logs import bar_interval
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train.batches import Batches
from nr_serve.train.blocks import is_out
from nr_serve.train.frozen_base import best_device
from nr_serve.train.learner import Learner, Sums
from nr_serve.train.recipe import Run


class TrainingDiverged(NrError):
    """The loss is no longer a finite number; the last checkpoint is from before that."""


class TrainingStopped(NrError):
    """Training could not go on; the last good checkpoint is kept."""


def diverged(out: Path, step: int, what: str, number: float) -> TrainingDiverged:
    """The error for a number that is not finite, after `step` steps of the run in `out`."""
    return TrainingDiverged(f"step {step}: the {what} is {number}; {_kept(out)}")


def _kept(out: Path) -> str:
    kept = checkpoints.latest(out)
    return f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"


def learning_rate(run: Run, step: int) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then the recipe's schedule. It is never 0."""
    seen, total = step * run.batch_tokens, run.steps * run.batch_tokens
    risen = (seen + run.batch_tokens) / max(1, run.warmup_tokens)
    left = min(1.0, (total - seen) / max(1, total - run.decay_start))
    if run.schedule == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return run.lr * min(1.0, risen, left)


def make_optimizer(trained: Mapping[str, nn.Parameter], run: Run) -> tuple[AdamW, LambdaLR]:
    """The optimizer and its schedule; parameters that start at 0 (W_out, LoRA's B) have their own learning rate."""
    out = [p for name, p in trained.items() if is_out(name)]
    rest = [p for name, p in trained.items() if not is_out(name)]
    groups = [{"params": rest, "lr": run.lr}, {"params": out, "lr": run.lr * run.out_lr_ratio}]
    groups = [group for group in groups if group["params"]]
    optimizer = AdamW(groups, lr=run.lr, weight_decay=run.weight_decay, foreach=True)
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate(run, step) / run.lr)


def training_arguments(run: Run, out: Path, *, tensorboard: bool) -> TrainingArguments:
    """The recipe's gradient steps as arguments of `transformers.Trainer`."""
    stops = run.patience is not None
    save, validate = run.every(run.checkpoint_every), run.every(run.validate_every)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=run.steps,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=1,  # one part of a step: see `Batches`
        gradient_accumulation_steps=run.accumulate,
        max_grad_norm=run.clip,
        bf16=run.dtype == "bfloat16",
        use_cpu=best_device().type == "cpu",  # without it, bf16 requires a GPU
        torch_compile=run.compile,
        ddp_find_unused_parameters=True,  # a block whose gate stays shut gets no gradient in a step
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=validate if stops else save,  # so that every measured step has a checkpoint
        save_total_limit=None,  # old checkpoints are removed once a newer one is complete: see RunTrainer
        eval_strategy="steps",
        eval_steps=validate,
        load_best_model_at_end=stops,
        restore_callback_states_from_checkpoint=stops,  # the count of measurements without a better loss
        metric_for_best_model="loss" if stops else None,
        greater_is_better=False if stops else None,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=["tensorboard"] if tensorboard else [],
        seed=run.seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # with several GPUs: one process each, never DataParallel
    # `accelerate launch` and earlier runs leave settings of these, which would override the recipe's.
    arguments.mixed_precision = "bf16" if run.dtype == "bfloat16" else "no"
    if not run.compile:
        arguments.torch_compile_backend = "no"
    _turn_tf32_off()
    return arguments


def _turn_tf32_off() -> None:
    """Compute float32 in float32: transformers and accelerate turn TF32 on for a compiled run, and leave it on."""
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "ieee"
    torch.backends.cuda.matmul.allow_tf32 = False


class RunTrainer(transformers.Trainer):
    """The gradient steps of a run."""

    def __init__(
        self,
        learner: Learner,
        batches: Batches,
        run: Run,
        arguments: TrainingArguments,
        *,
        validate: Callable[[int], float],
        describe: Callable[[Path, int], checkpoints.Checkpoint],
        log: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """`validate` measures after a number of steps; `describe` makes the `Checkpoint` for a folder at a step.

        `log` writes a line of the run's log; it is called in every process.
        """
        self.learner, self.run, self.validate, self.describe, self.write = learner, run, validate, describe, log
        self.out = Path(str(arguments.output_dir))
        self.batches = batches
        callbacks: list[TrainerCallback] = [EarlyStoppingCallback(run.patience)] if run.patience else []
        super().__init__(
            model=self.learner,
            args=arguments,
            train_dataset=self.batches,
            eval_dataset=[],  # the run measures by itself
            data_collator=lambda parts: parts[0],
            optimizers=make_optimizer(learner.trained(), run),
            callbacks=callbacks,
        )
        _turn_tf32_off()
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)  # it and the default bar print every log line on stdout
        self.pop_callback(ProgressCallback)
        self.bar = Bar()
        self.add_callback(self.bar)
        self.add_callback(LastStepLogged())
        self._sums: Sums = {}
        self._loss = torch.zeros((), device=arguments.device)
        self._since, self._logged_step = time.monotonic(), 0

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The learner's loss on one part of a step."""
        if not self._sums:  # first batch since the last log line: time for measuring does not count in the rate
            self._since, self._logged_step = time.monotonic(), self.state.global_step
        output = model(**inputs)
        for name, pair in output["sums"].items():
            self._sums[name] = self._sums.get(name, 0.0) + pair
        self._loss = self._loss + output["loss"].detach()
        return (output["loss"], output) if return_outputs else output["loss"]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradients. Raises TrainingDiverged in all processes if they or the loss are not finite."""
        norm: Tensor = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        self._check(self._over_processes(self._loss) / self.batches.parts, "loss")
        self._loss = torch.zeros_like(self._loss)
        self._check(norm, "gradient norm")
        return norm

    def _over_processes(self, value: Tensor) -> Tensor:
        """The sum of a value over all processes."""
        summed: Tensor = self.accelerator.reduce(value, "sum")
        return summed

    def _check(self, value: Tensor, what: str) -> None:
        number, step = float(value.detach()), self.state.global_step
        if not math.isfinite(number):
            self.write({"event": "diverged", "step": step, what: number})
            raise diverged(self.out, step, what, number)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means over everything read since the last line, and the rate; no mean over nothing."""
        if self._sums and "loss" in logs:
            step = self.state.global_step
            totals = self._over_processes(torch.stack(list(self._sums.values()))).tolist()
            means = zip(self._sums, totals, strict=True)
            logs |= {name: total / over for name, (total, over) in means if over}
            tokens = (step - self._logged_step) * self.run.batch_tokens
            logs["tokens_a_second"] = tokens / (time.monotonic() - self._since)
            self._sums = {}
            self.write({"event": "step", "step": step, "tokens": step * self.run.batch_tokens} | _plain(logs))
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out sources; this does not count as training time."""
        began = time.monotonic()
        metrics = {"eval_loss": self.validate(self.state.global_step)}
        self._since += time.monotonic() - began
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        assert output_dir is not None
        if self.args.should_save:  # True in one process only
            checkpoints.save_weights(Path(output_dir), self.learner.trained_state())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a complete checkpoint; this does not count as training time."""
        began = time.monotonic()
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if not is_write_fault(error):
                raise
            fault = f"cannot write a checkpoint in {self.out}: {error}"
            raise TrainingStopped(f"{fault}; {_kept(self.out)}") from error
        self.accelerator.wait_for_everyone()  # wait until each process has written its random state
        if self.args.should_save:
            step, best = self.state.global_step, self.state.best_global_step
            stopped = bool(self.control.should_training_stop) and step < self.run.steps
            described = self.describe(checkpoints.at_step(self.out, step), step)
            checkpoints.complete(replace(described, best_step=best, stopped=stopped))
            checkpoints.rotate(self.out, keep=best)
        self._since += time.monotonic() - began

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: the run has loaded the weights already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load them, with this recipe's rates and intervals: a checkpoint has those of the run that wrote it."""
        super()._load_optimizer_and_scheduler(checkpoint)
        state: Any = self.state
        state.compute_steps(self.args, state.max_steps)
        schedule: Any = self.lr_scheduler
        groups = schedule.optimizer.param_groups
        for group, rate, share in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * share(schedule.last_epoch)

    def _load_best_model(self) -> None:
        """Do nothing: the run loads the best weights itself, also when no step was left to take."""


class LastStepLogged(TrainerCallback):
    """Makes the trainer log after the last step too, where the steps are not a multiple of `log_every`."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a log line after the last step."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class Bar(ProgressCallback):
    """A progress bar on stderr with the latest losses."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **how: Any) -> None:
        """Start the bar at the current step."""
        super().on_train_begin(args, state, control, **how)  # type: ignore[no-untyped-call]
        bar: Any = self.training_bar  # None in all processes but the first
        if bar is not None:
            bar.mininterval = bar_interval()
            self.current_step = bar.n = bar.initial = state.global_step  # else earlier steps count as fast

    def close(self) -> None:
        """Draw the bar a last time, so that it does not reappear after an error message."""
        bar: Any = self.training_bar
        if bar is not None:
            bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the latest losses and fired shares."""
        bar: Any = self.training_bar
        if bar is not None and "lm" in logs:
            fired = [f"{logs['target_fired']:.0%} of target"] if "target_fired" in logs else []
            fired += [f"{logs['other_fired']:.2%} of others"] if "other_fired" in logs else []
            said = [f"lm {logs['lm']:.3f}"] + ([f"fired {', '.join(fired)}"] if fired else [])
            bar.set_postfix_str(", ".join([*said, f"{logs['tokens_a_second']:.0f} tokens/s"]), refresh=False)


def _plain(logs: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in logs.items()}
