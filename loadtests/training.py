"""Training speed of the methods beside each other, at equal extra parameters, on the CPU.

    python loadtests/training.py adapters/hu/recipe.toml --corpus corpus --steps 20

One recipe, one process. Each method has its own copy of the base. The steps are interleaved in rounds, one step of
each method, so that what slows the machine down slows all of them down. A step is as in training: the same windows,
forward, backward, clipping, AdamW. Every method reads as many tokens a step; neutral alone reads background text,
for which it takes no backward pass down the stream. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from nr_serve.evaluate.tables import markdown
from nr_serve.logs import say
from nr_serve.train.batches import Batches
from nr_serve.train.frozen_base import load_base
from nr_serve.train.gates import fit_gates, gate_classes
from nr_serve.train.learner import Batch, Learner
from nr_serve.train.methods import make_learner
from nr_serve.train.recipe import BadRecipe, Recipe
from nr_serve.train.recipe_file import read_recipe
from nr_serve.train.text import read_classes
from nr_serve.train.text.mix import Classes
from nr_serve.train.trainer import make_optimizer

_say = partial(say, "training")
METHODS = ("neutral", "adapter", "lora", "finetune")


@dataclass
class Runner:
    """One method's learner, and how long its steps took."""

    recipe: Recipe
    batches: Batches
    learner: Learner
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    seconds: list[float] = field(default_factory=list)
    fired: list[float] = field(default_factory=list)
    """Share of token-layers of the target that fired, by step."""

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.learner.trained().values())

    @property
    def rates(self) -> list[float]:
        """Tokens a second, by step."""
        return [self.recipe.run.batch_tokens / seconds for seconds in self.seconds]

    def step(self, number: int) -> None:
        """The run's gradient step of this number, timed."""
        accumulate = self.recipe.run.accumulate
        parts = [self.batches[number * accumulate + i] for i in range(accumulate)]
        started = time.perf_counter()
        fired = self._take(parts)
        seconds = time.perf_counter() - started
        self.seconds.append(seconds)
        self.fired.append(fired)

    def _take(self, parts: Sequence[Batch]) -> float:
        fired = torch.zeros(2, dtype=torch.float64)
        bfloat16 = self.recipe.run.dtype == "bfloat16"
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                output = self.learner(**part)
            (output["loss"] / len(parts)).backward()
            fired += output["sums"]["target_fired"]
        torch.nn.utils.clip_grad_norm_(list(self.learner.trained().values()), self.recipe.run.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        number, over = fired.tolist()
        return number / over if over else 0.0


def make_runner(recipe: Recipe, classes: Classes, fit_tokens: int) -> Runner:
    """A method's learner as training starts with it, its gates fitted on `fit_tokens` tokens of each class."""
    base = load_base(recipe.base, recipe.base_dtype)
    learner = make_learner(recipe, base)
    if recipe.method == "neutral" and recipe.gate.fitted:
        _say("fitting the gates")
        few = gate_classes(classes, fit_tokens)
        fit_gates(base.model, learner.attached, few, recipe.gate, original=classes.original)
    learner.train()
    batches = Batches(classes, recipe.plan, 1)
    return Runner(recipe, batches, learner, *make_optimizer(learner.trained(), recipe.run))


def main(argv: list[str] | None = None) -> None:
    """Make the learners, take the rounds, print."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    changes: dict[str, Any] = {"lora.rank": None}  # as many parameters as the blocks have
    if args.tokens is not None:
        changes["run.batch_tokens"] = args.tokens
    recipes = {method: read_recipe(args.recipe, changes | {"method": method}) for method in args.method}
    first = next(iter(recipes.values()))
    if first.run.compile:
        raise BadRecipe("run.compile is not measured here")
    _say("reading and packing the text")
    classes = read_classes(args.corpus, first.data, load_base(first.base).tokenizer, first.run)
    runners = {method: make_runner(recipe, classes, args.fit_tokens) for method, recipe in recipes.items()}
    rounds = args.warmup + args.steps
    for number in range(rounds):
        for runner in runners.values():
            runner.step(number)
        _say(f"round {number + 1} of {rounds}: " + ", ".join(f"{m} {r.rates[-1]:.0f}" for m, r in runners.items()))
    measured = summarise(runners, args.warmup)
    print("\n".join(markdown(table(measured))))
    result = {
        "methods": measured,
        "steps": args.steps,
        "warmup": args.warmup,
        "tokens_a_step": first.run.batch_tokens,
        "fit_tokens": args.fit_tokens,
        "recipe": first.dump(),
    }
    print(json.dumps(result | provenance(__file__, argv)))


def summarise(runners: dict[str, Runner], warmup: int) -> dict[str, dict[str, Any]]:
    """Medians over the rounds after the warm-up; a ratio is the median of those of each round."""
    lora = runners.get("lora")
    return {
        method: {
            "parameters": runner.parameters,
            "tokens_a_second": statistics.median(runner.rates[warmup:]),
            "seconds_a_step": statistics.median(runner.seconds[warmup:]),
            "target_fired": statistics.median(runner.fired[warmup:]),
            "speed_to_lora": None if lora is None else _ratio(runner.rates[warmup:], lora.rates[warmup:]),
            "rounds": {"tokens_a_second": runner.rates[warmup:], "seconds": runner.seconds[warmup:]},
        }
        for method, runner in runners.items()
    }


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(measured: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row per method."""
    header = [
        "METHOD",
        "PARAMETERS",
        "TOKENS A SECOND",
        "SECONDS A STEP",
        "TO LORA",
        "FIRED",
    ]
    return [
        header,
        *(
            [
                method,
                f"{m['parameters']:,}",
                f"{m['tokens_a_second']:,.0f}",
                f"{m['seconds_a_step']:.3f}",
                "-" if m["speed_to_lora"] is None else f"{m['speed_to_lora']:.2f}",
                f"{m['target_fired']:.1%}",
            ]
            for method, m in measured.items()
        ),
    ]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a training recipe; its method is replaced")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of text, as fetch-corpus leaves it")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="to measure")
    parser.add_argument("--steps", type=_positive, default=20, help="rounds measured")
    parser.add_argument("--warmup", type=_whole, default=3, help="rounds before them that do not count")
    parser.add_argument("--tokens", type=_positive, help="tokens per step (default: the recipe's)")
    parser.add_argument(
        "--fit-tokens", type=_positive, default=2048, help="tokens of each class that fit the gates"
    )
    return parser.parse_args(argv)


def _positive(written: str) -> int:
    return _whole(written, 1)


def _whole(written: str, least: int = 0) -> int:
    number = int(written)
    if number < least:
        raise argparse.ArgumentTypeError(f"{written} is less than {least}")
    return number


if __name__ == "__main__":
    main()
