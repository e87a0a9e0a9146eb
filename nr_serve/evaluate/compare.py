"""Training methods beside each other: what each run learned of its target and forgot of the base's own text.

With losses on held-out text, T the target's and E the base's own language from sources that no run trained on:
learned = (base_T - run_T) / (base_T - finetune_T), forgotten = (run_E - base_E) / (finetune_E - base_E), as in the
tables of arXiv 2410.02744. Without a finetune run both are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nr_serve.errors import BadRequest, Conflict
from nr_serve.evaluate.plots import Point, loss_curves, pareto, read_losses
from nr_serve.evaluate.tables import Rows, markdown
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train.attach import Attached
from nr_serve.train.base import load_base
from nr_serve.train.entries import language_of, names_language, names_source
from nr_serve.train.export import load_run
from nr_serve.train.measure import measure
from nr_serve.train.pack import Windows
from nr_serve.train.recipe import Recipe, parse_recipe
from nr_serve.train.text import read_heldout

WINDOW = 256


@dataclass(frozen=True)
class RunReport:
    """One run, measured."""

    method: str
    tokens: int
    """Tokens trained on, of all windows."""
    parameters: int
    """Trained parameters."""
    lr: float
    seconds: float
    """Time of its steps, by its log."""
    losses: Mapping[str, float]
    """Held-out loss by source, nats a token."""
    fired: Mapping[str, float]
    """Share of token-layers that fired by source; empty for a method without blocks."""
    target: float
    """Mean loss over the target's sources."""
    original: float
    """Mean loss over sources of the base's own language that were not trained on."""


@dataclass(frozen=True)
class Comparison:
    """The base and some runs on it."""

    base: str
    domain: str
    target_sources: tuple[str, ...]
    original_sources: tuple[str, ...]
    base_losses: Mapping[str, float]
    base_target: float
    base_original: float
    windows: Mapping[str, int]
    """Windows read, by source."""
    runs: Mapping[str, RunReport]

    def learned(self, name: str) -> float | None:
        """Share of what finetuning learned; None without a finetune run that learned."""
        finetune = self._finetune()
        if finetune is None or self.base_target <= finetune.target:
            return None
        return (self.base_target - self.runs[name].target) / (self.base_target - finetune.target)

    def forgotten(self, name: str) -> float | None:
        """Share of what finetuning forgot; None without a finetune run that forgot."""
        finetune = self._finetune()
        if finetune is None or finetune.original <= self.base_original:
            return None
        return (self.runs[name].original - self.base_original) / (finetune.original - self.base_original)

    def _finetune(self) -> RunReport | None:
        """The finetune run that learned most."""
        tuned = [run for run in self.runs.values() if run.method == "finetune"]
        return min(tuned, key=lambda run: run.target) if tuned else None

    def to_json(self) -> str:
        """Everything, as one JSON document."""
        shares = {name: {"learned": self.learned(name), "forgotten": self.forgotten(name)} for name in self.runs}
        return json.dumps(asdict(self) | {"shares": shares}, indent=1, sort_keys=True)


def compare_runs(
    runs: Mapping[str, Path], corpus: Path, sources: Sequence[str], *, windows: int = 32
) -> Comparison:
    """Measure runs of one domain and base, in their folders, on held-out text.

    `sources` are globs of files in `corpus`, `windows` the most windows of each. Raises BadRequest if the runs are
    of several domains or bases, or if there is no source of the target or none of the base's own language.
    """
    recipes = {name: _recipe(folder) for name, folder in runs.items()}
    if len({(recipe.base, recipe.domain) for recipe in recipes.values()}) != 1:
        raise BadRequest("the runs are not all of one base and one domain", param="runs")
    first = next(iter(recipes.values()))
    base = load_base(first.base)
    texts = read_heldout(corpus, sources, base.tokenizer, WINDOW, windows)
    target = tuple(name for name in texts if first.owns(name))
    original = tuple(name for name in texts if all(_is_unread_original(name, r) for r in recipes.values()))
    for what, found in (("the target", target), ("the base's own language, unread by every run,", original)):
        if not found:
            raise BadRequest(f"no source of {what} is among those to measure", param="source")
    before = {n: r.loss for n, r in measure(base.model, Attached(base.model, []), texts).items()}
    return Comparison(
        base=base.name,
        domain=first.domain,
        target_sources=target,
        original_sources=original,
        base_losses=before,
        base_target=_mean(before, target),
        base_original=_mean(before, original),
        windows={name: len(text) for name, text in texts.items()},
        runs={name: _measure_run(folder, texts, target, original) for name, folder in runs.items()},
    )


def write_comparison(comparison: Comparison, runs: Mapping[str, Path], folder: Path) -> list[Path]:
    """Write comparison.json and comparison.md, the loss curves, and with a finetune run the Pareto picture."""
    written = [folder / "comparison.json", folder / "comparison.md"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written[0].write_text(comparison.to_json(), encoding="utf-8")
        written[1].write_text(page(comparison), encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"cannot write in {folder}: {error.strerror}") from error
    shares = [(name, comparison.forgotten(name), comparison.learned(name)) for name in comparison.runs]
    points = [Point(name, f, learned) for name, f, learned in shares if f is not None and learned is not None]
    if points:
        written.append(folder / "pareto.svg")
        pareto(written[-1], points, title=f"{comparison.domain}: learned and forgotten, as shares of finetuning's")
    curves = {name: read_losses(run / "log.jsonl").get("train", []) for name, run in runs.items()}
    written.append(folder / "loss.svg")
    loss_curves(written[-1], {name: curve for name, curve in curves.items() if curve}, title="LM loss in training")
    return written


def rows(comparison: Comparison) -> Rows:
    """A row for the base, and one a run."""
    header = ["RUN", "METHOD", "LR", "TOKENS", "TRAINED PARAMETERS", "MINUTES", "TARGET", "ENGLISH UNREAD"]
    losses = [f"{comparison.base_target:.4f}", f"{comparison.base_original:.4f}"]
    backbone = ["backbone", "-", "-", "0", "0", "0", *losses, "0.0%", "0.0%"]
    return [[*header, "LEARNED", "FORGOTTEN"], backbone, *(_row(comparison, name) for name in comparison.runs)]


def _row(comparison: Comparison, name: str) -> list[str]:
    run = comparison.runs[name]
    return [
        name,
        run.method,
        f"{run.lr:g}",
        f"{run.tokens:,}",
        f"{run.parameters:,}",
        f"{run.seconds / 60:.0f}",
        f"{run.target:.4f}",
        f"{run.original:.4f}",
        _percent(comparison.learned(name)),
        _percent(comparison.forgotten(name)),
    ]


def source_rows(comparison: Comparison) -> Rows:
    """Held-out loss by source and run."""
    runs = comparison.runs.values()
    header = ["SOURCE", "WINDOWS", "BACKBONE", *(name.upper() for name in comparison.runs)]
    body = [
        [source, f"{comparison.windows[source]}", f"{base:.4f}", *(f"{run.losses[source]:.4f}" for run in runs)]
        for source, base in comparison.base_losses.items()
    ]
    return [header, *body]


def page(comparison: Comparison) -> str:
    """The comparison as a page of Markdown."""
    lines = [
        f"# {comparison.domain}: training methods compared",
        "",
        f"Held-out loss on `{comparison.base}` in nats a token, windows of {WINDOW} tokens. Target: the mean over "
        f"{', '.join(comparison.target_sources)}. English unread: the mean over "
        f"{', '.join(comparison.original_sources)}, which no run trained on.",
        "",
        *markdown(rows(comparison)),
        "",
        *markdown(source_rows(comparison)),
    ]
    return "\n".join(lines) + "\n"


def _measure_run(
    folder: Path, texts: Mapping[str, Windows], target: Sequence[str], original: Sequence[str]
) -> RunReport:
    recipe, base, learner, saved = load_run(folder, "float32")  # as the backbone is measured
    measured = measure(base.model, learner.attached, texts)
    losses = {name: result.loss for name, result in measured.items()}
    return RunReport(
        method=recipe.method,
        tokens=saved.step * recipe.run.batch_tokens,
        parameters=sum(p.numel() for p in learner.trained().values()),
        lr=recipe.run.lr,
        seconds=_seconds(folder / "log.jsonl"),
        losses=losses,
        fired={name: result.fired[0] for name, result in measured.items() if result.fired},
        target=_mean(losses, target),
        original=_mean(losses, original),
    )


def _seconds(log: Path) -> float:
    """Time of a run's steps: the tokens between two lines over their rate."""
    total, before = 0.0, 0
    for line in log.read_text(encoding="utf-8").splitlines():
        entry: dict[str, Any] = json.loads(line)
        if entry["event"] == "step":
            total += max(0, entry["tokens"] - before) / entry["tokens_a_second"]
            before = max(before, entry["tokens"])
    return total


def _recipe(folder: Path) -> Recipe:
    found = checkpoints.latest(folder)
    if found is None:
        raise Conflict(f"{folder} holds no checkpoint")
    return parse_recipe(checkpoints.load(found).recipe, f"the recipe in {found}")


def _is_unread_original(source: str, recipe: Recipe) -> bool:
    original = recipe.data.original
    is_original = any(names_language(entry, language_of(source)) for entry in original)
    return is_original and not recipe.owns(source) and not any(names_source(entry, source) for entry in original)


def _mean(losses: Mapping[str, float], sources: Sequence[str]) -> float:
    return sum(losses[source] for source in sources) / len(sources)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
