"""The training loop: a recipe and a corpus in, an adapter file out.

A run is a function of its recipe, corpus and base: no random state lives in the loop, so a resumed run takes
exactly the steps that an uninterrupted one takes.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nr_serve.errors import Conflict, NrError
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train import losses, text
from nr_serve.train.attach import AdapterModule, Attached, window_inputs
from nr_serve.train.base import FrozenBase, load_base
from nr_serve.train.export import restore, write_run
from nr_serve.train.gates import fit_gates, gate_classes
from nr_serve.train.measure import SourceResult, measure
from nr_serve.train.recipe import Recipe, Run, parse_recipe, read_recipe


class TrainingDiverged(NrError):
    """The loss is no longer a number; the last checkpoint is from before."""


def train(recipe: Path, out: Path, corpus: Path, *, resume: bool = False) -> Path:
    """Train an adapter as `recipe` says, on the text in `corpus`; returns the file, `out`/<domain>.safetensors.

    `out` also receives checkpoints and `log.jsonl`. Raises BadRecipe; Conflict if `out` holds another run or
    another process trains there; TrainingDiverged if the loss stops being finite.
    """
    plan = read_recipe(recipe)
    out.mkdir(parents=True, exist_ok=True)
    with checkpoints.alone(out):
        found = checkpoints.latest(out)
        if found is not None and not resume:
            raise Conflict(f"{out} holds checkpoints of an earlier run; resume it or name another folder")
        saved = None if found is None else checkpoints.load(found)
        trainer = Trainer(plan, load_base(plan.base, plan.run.dtype), out, corpus, saved)
        trainer.run()
        return trainer.export(out / f"{plan.domain}.safetensors")


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


@dataclass
class StepResult:
    """What one step measured."""

    lm: float
    """LM loss, nats a token."""
    local: float
    norm: float
    """Norm of the gradient before clipping."""
    target_fired: float
    """Share of the target's token-layers that fired."""
    other_fired: float
    """Share of the other windows' token-layers that fired."""


class Trainer:
    """One run: the base with its blocks, the optimizer, the text."""

    def __init__(
        self, recipe: Recipe, base: FrozenBase, out: Path, corpus: Path, saved: checkpoints.Checkpoint | None
    ) -> None:
        self.recipe, self.base, self.out = recipe, base, out
        run = recipe.run
        self.log_path = out / "log.jsonl"
        _say("reading and packing the text")
        self.classes = text.read_classes(corpus, recipe.data, base.tokenizer, run)
        self.heldout = text.read_heldout(
            corpus, recipe.data.heldout, base.tokenizer, run.window, run.validate_windows
        )
        self.mix = text.Mix(self.classes, run)
        h = recipe.blocks.width(base.parameters, base.d, base.layers)
        self.adapter = AdapterModule.fresh(base.layers, base.d, h, recipe.blocks.carry, run.seed)
        self.attached = Attached(base.model, [self.adapter])
        self.step, self.results = 0, dict[str, Any]()
        if saved is None:
            self._start()
        else:
            self._resume(saved)

    def _start(self) -> None:
        if self.recipe.gate.init == "closed-form":
            self.fit_gates()
        self.optimizer = self._optimizer()
        self.validate()
        self.save()

    def _resume(self, saved: checkpoints.Checkpoint) -> None:
        tokens = saved.step * self.recipe.run.batch_tokens
        if not self.recipe.continues(parse_recipe(saved.recipe), tokens):
            raise Conflict("the recipe differs from that of the run to resume")
        if saved.base_fingerprint != self.base.fingerprint:
            raise Conflict("the base differs from that of the run to resume")
        if saved.text_digest != self.classes.digest():
            raise Conflict("the corpus differs from that of the run to resume")
        self.adapter = restore(self.recipe, self.base, saved.blocks)
        self.attached.adapters = [self.adapter]
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(saved.optimizer)
        self.step, self.results = saved.step, saved.results
        _say(f"resuming after step {self.step}")

    def _optimizer(self) -> torch.optim.AdamW:
        trained = self.recipe.gate.trained
        for name, parameter in self.adapter.named_parameters():
            parameter.requires_grad_(trained or name.rsplit(".", 1)[1] not in ("gate", "bias"))
        run = self.recipe.run
        parameters = [p for p in self.adapter.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=run.lr, weight_decay=run.weight_decay, foreach=True)

    def fit_gates(self, *, only_bias: bool = False) -> None:
        """Fit the gates in closed form on the stream as it is (or set their thresholds anew) and log how well."""
        _say("fitting the gates")
        gate = self.recipe.gate
        classes = gate_classes(self.classes, gate.fit_tokens)
        report = fit_gates(self.base.model, self.attached, classes, gate, only_bias=only_bias)
        self._log({"event": "gates", "layers": {i: asdict(fit) for i, fit in report.items()}})
        found = sum(fit.found for fit in report.values()) / len(report)
        worst = max(max(fit.misfired.values()) for fit in report.values())
        _say(f"gates find {found:.1%} of the target, misfire on at most {worst:.2%} of a class in a layer")

    def run(self) -> None:
        """Take the steps that are left."""
        run = self.recipe.run
        since, tokens = time.monotonic(), 0
        while self.step < run.steps:
            result = self.take_step()
            self._check(result)
            self.step += 1
            tokens += run.batch_tokens
            if self.step % run.log_every == 0 or self.step == run.steps:
                rate = tokens / (time.monotonic() - since)
                self._report(result, rate)
                since, tokens = time.monotonic(), 0
            if self._due(run.validate_every):
                self.validate()
                since, tokens = time.monotonic(), 0
            if self._due(run.checkpoint_every):
                self.save()

    def take_step(self) -> StepResult:
        """One gradient step: forward and backward on the batch, clip, update."""
        target, original, background = self.mix.batch(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.run, self.step)
        spoken = original if self.recipe.loss.lm_on_original else None
        lm, target_fired = self._learn(target, spoken)
        quiet = [windows for windows in (original, background) if windows is not None and windows is not spoken]
        local, other_fired = self._keep_quiet(text.join(quiet)) if quiet else (0.0, 0.0)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.recipe.run.clip)
        if math.isfinite(float(norm)) and math.isfinite(lm + local):
            self.optimizer.step()
        return StepResult(lm, local, float(norm), target_fired, other_fired)

    def _learn(self, target: text.Windows, original: text.Windows | None) -> tuple[float, float]:
        """Gradient of the LM loss on these windows, and of the local loss on the original ones among them.

        Returns the LM loss and the share of token-layers fired.
        """
        windows = target if original is None else text.join([target, original])
        local = None if original is None else losses.LOCAL[self.recipe.loss.kind]
        is_original_BT = (torch.arange(len(windows)) >= len(target))[:, None].expand_as(windows.ids_NT)
        record = self.attached.begin(windows.offset_NT, local, is_original_BT)
        output = self.base.model(windows.ids_NT, use_cache=False, **window_inputs(windows.offset_NT))
        lm = losses.lm_loss(output.logits, losses.next_token_labels(windows.ids_NT, windows.offset_NT))
        quiet = losses.local_loss(record.local_sum, max(1, int(is_original_BT.sum())), self.adapter.depth)
        loss = lm + self.recipe.loss.alpha * quiet
        if loss.requires_grad:  # not if no gate fired at all
            torch.autograd.backward(loss)
        return float(lm.detach()), record.fired_share(0)

    @torch.no_grad()
    def _keep_quiet(self, others: text.Windows) -> tuple[float, float]:
        """Gradient of the local loss on text that is not the target's; (loss, share of token-layers fired).

        Each block answers for its own residue: the gradient does not run down the stream, so these windows
        cost a forward pass and the few tokens that fired.
        """
        record = self.attached.begin(others.offset_NT, losses.LOCAL[self.recipe.loss.kind])
        self.base.model.model(others.ids_NT, use_cache=False, **window_inputs(others.offset_NT))
        loss = losses.local_loss(record.local_sum, others.ids_NT.numel(), self.adapter.depth)
        if loss.requires_grad:
            with torch.enable_grad():
                torch.autograd.backward(self.recipe.loss.alpha * loss)
        return float(loss), record.fired_share(0)

    def validate(self) -> Mapping[str, SourceResult]:
        """Measure the held-out sources as the adapter is now, and log them."""
        measured = measure(self.base.model, self.attached, self.heldout)
        for name, source in measured.items():
            before = self.results.get(name, {}).get("before", source.loss)
            self.results[name] = {"before": before, "after": source.loss, "fired": source.fired[0]}
        self._log({"event": "heldout", "sources": self.results})
        for name, r in self.results.items():
            _say(f"  {name:16} loss {r['before']:.3f} -> {r['after']:.3f}  fired {r['fired']:.2%}")
        return measured

    def save(self) -> None:
        """Write a checkpoint."""
        saved = checkpoints.Checkpoint(
            step=self.step,
            recipe=self.recipe.dump(),
            base_fingerprint=self.base.fingerprint,
            text_digest=self.classes.digest(),
            results=self.results,
            blocks=self.adapter.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )
        checkpoints.save(self.out, saved)

    def export(self, path: Path) -> Path:
        """Write the adapter file as training stands."""
        self.save()
        self.validate()
        results = {"tokens": self.step * self.recipe.run.batch_tokens, "heldout": self.results}
        return write_run(path, self.recipe, self.base, self.adapter, results)

    def _check(self, result: StepResult) -> None:
        if not math.isfinite(result.lm + result.local + result.norm):
            self._log({"event": "diverged", "step": self.step, **asdict(result)})
            raise TrainingDiverged(
                f"step {self.step}: LM loss {result.lm}, local loss {result.local}, gradient norm {result.norm}; "
                f"the last good checkpoint is {checkpoints.latest(self.out)}"
            )

    def _due(self, every_tokens: int) -> bool:
        tokens, batch = self.step * self.recipe.run.batch_tokens, self.recipe.run.batch_tokens
        return tokens // every_tokens > (tokens - batch) // every_tokens

    def _report(self, result: StepResult, rate: float) -> None:
        run = self.recipe.run
        done = self.step * run.batch_tokens
        self._log({"event": "step", "step": self.step, "tokens": done, "tokens_a_second": rate, **asdict(result)})
        _say(
            f"{done:,}/{run.tokens:,} tokens  {rate:.0f}/s  lm {result.lm:.3f}  local {result.local:.2e}  "
            f"norm {result.norm:.2f}  fired {result.target_fired:.1%} of target, {result.other_fired:.2%} of others"
        )

    def _log(self, entry: dict[str, Any]) -> None:
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


def _say(message: str) -> None:
    print(f"train: {message}", file=sys.stderr, flush=True)
