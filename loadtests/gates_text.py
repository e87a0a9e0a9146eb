"""Which text plays which part in the study of gates, and its windows."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nr_serve.train.text import read_heldout
from nr_serve.train.text.pack import Windows, join

TARGET_TIMES = 4
"""The target has this many times the text of another class, as in training."""


@dataclass(frozen=True)
class Plan:
    """Which text plays which part."""

    target: str
    background: Sequence[str]
    """Languages in the order in which they join the background; the target's close relatives come last."""
    relatives: Sequence[str]
    kept_out: Sequence[str]
    """Languages in no fit."""
    original: Sequence[str]
    """Sources of the base's own language that every gate is fitted against."""
    unfitted: Sequence[str]
    """Those that none is."""

    def fitted(self, background: int) -> list[str]:
        """The classes that a gate is fitted against."""
        return [*self.original, *self.background[:background]]

    @property
    def unrelated(self) -> int:
        """Size of the largest background that holds no close relative."""
        return len(self.background) - len(self.relatives)


def make_plan(corpus: Path, args: argparse.Namespace) -> Plan:
    """The parts of all text in a corpus folder. What is not named is drawn by the seed."""
    rng = random.Random(args.seed)
    languages, sources = _listed(corpus, args.original)
    absent = [name for name in [args.target, *args.relative, *args.kept_out] if name not in languages]
    absent += [name for name in args.unfitted if name not in sources]
    if absent:
        raise SystemExit(f"no text to fit and to report on for {', '.join(absent)} in {corpus}")
    parts = [args.target, *args.relative, *args.kept_out]
    if len(set(parts)) < len(parts):
        raise SystemExit("a language is named for two parts")
    others = [name for name in languages if name not in (args.target, *args.relative)]
    kept_out = args.kept_out or rng.sample(others, min(4, len(others) // 3))
    unfitted = args.unfitted or rng.sample(sources, min(2, len(sources) // 2))
    original = [name for name in sources if name not in unfitted]
    if not (original and unfitted and kept_out):
        raise SystemExit(f"{corpus} has too few languages or too few sources of {args.original}")
    background = [name for name in others if name not in kept_out]
    rng.shuffle(background)
    return Plan(args.target, [*background, *args.relative], args.relative, kept_out, original, unfitted)


def _listed(corpus: Path, original: str) -> tuple[list[str], list[str]]:
    """The other languages, and the sources of the base's own, that have text of both kinds."""

    def sources(part: str) -> set[str]:
        return {".".join(path.name.split(".")[:2]) for path in corpus.glob(f"*.*.{part}.txt*")}

    both = sources("train") & sources("heldout")
    languages = {name.split(".")[0] for name in both} - {original}
    return sorted(languages), sorted(name for name in both if name.split(".")[0] == original)


@dataclass(frozen=True)
class Class:
    """The windows of one class of text among all: rows [first, first + count)."""

    first: int
    count: int

    @property
    def rows(self) -> slice:
        """Where they are."""
        return slice(self.first, self.first + self.count)


class Text:
    """All windows of all classes: those that fit, by class, and the held-out ones that report."""

    def __init__(self) -> None:
        self.fit: dict[str, Class] = {}
        self.report: dict[str, Class] = {}
        self._parts: list[Windows] = []
        self._count = 0

    def add(self, part: dict[str, Class], name: str, windows: Windows) -> None:
        """Lay a class's windows behind all others."""
        part[name] = Class(self._count, len(windows))
        self._parts.append(windows)
        self._count += len(windows)

    def windows(self) -> Windows:
        """All of them."""
        return join(self._parts)


def read_text(corpus: Path, tokenizer: Any, plan: Plan, window: int, tokens: int) -> Text:
    """About `tokens` tokens of each class to fit, `TARGET_TIMES` as many of a target, and `tokens` held out.

    Every source of a language has an equal part in it.
    """
    text = Text()
    for name in [plan.target, *plan.original, *plan.background]:
        times = TARGET_TIMES if name == plan.target else 1
        text.add(
            text.fit, name, _read(corpus, f"{_glob(plan, name)}.train.txt*", tokenizer, window, times * tokens)
        )
    for name in [*text.fit, *plan.unfitted, *plan.kept_out]:
        text.add(text.report, name, _read(corpus, f"{_glob(plan, name)}.heldout.txt*", tokenizer, window, tokens))
    return text


def _glob(plan: Plan, name: str) -> str:
    return name if name in plan.original or name in plan.unfitted else f"{name}.*"


def _read(corpus: Path, glob: str, tokenizer: Any, window: int, tokens: int) -> Windows:
    """Windows of the sources that match, in a shuffled order, so that both halves are of every source."""
    count = max(2, tokens // window)
    sources = read_heldout(corpus, [glob], tokenizer, window, count)
    each = -(-count // len(sources))
    pooled = join(windows.take(slice(each)) for windows in sources.values())
    order = list(range(len(pooled)))
    random.Random(glob).shuffle(order)
    return pooled.take(order[:count])
