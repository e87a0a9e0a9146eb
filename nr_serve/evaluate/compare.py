"""Training runs measured beside each other, and the comparison's files; what is in them: `comparison_report`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from nr_serve.disk import make_folder, write_text
from nr_serve.errors import BadRequest
from nr_serve.evaluate.comparison_report import Comparison, RunReport, page
from nr_serve.evaluate.difference import difference, error_of_mean
from nr_serve.evaluate.hosted import Subject
from nr_serve.evaluate.readings import in_turn, measure_text
from nr_serve.evaluate.roles import RecipeText, warn_of_learned
from nr_serve.evaluate.tasks import Answer, Example, answer_tasks, score
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train.attach import Attached
from nr_serve.train.digest import digest
from nr_serve.train.entries import language_of, names_language, names_source
from nr_serve.train.frozen_base import best_device, load_base
from nr_serve.train.learner import Learner
from nr_serve.train.log import training_losses, training_seconds
from nr_serve.train.measure import SourceResult, evaluating
from nr_serve.train.recipe import Recipe
from nr_serve.train.restore import load_run, read_run
from nr_serve.train.text import read_heldout
from nr_serve.train.text.pack import Windows
from nr_serve.train.text.sources import find_sources

WINDOW = 256

Tasks = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Benchmark:
    """The texts and tasks that the base and every run are measured on."""

    texts: Mapping[str, Windows]
    target: tuple[str, ...]
    """Names of the target's texts."""
    original: tuple[str, ...]
    """Names of texts in the base's own language that no run read."""
    tasks: Tasks

    def measure(self, subject: Subject) -> tuple[dict[str, SourceResult], dict[str, list[Answer]]]:
        """Results by text, and answers by task."""
        results = {source: measure_text(subject, windows, place) for source, windows, place in in_turn(self.texts)}
        with evaluating(subject.base.model):
            return results, answer_tasks(subject, self.tasks)

    def means(self, losses: Mapping[str, float]) -> tuple[float, float]:
        """Mean losses: over the target's texts, and over the base's own language's texts."""
        target, original = ([losses[source] for source in part] for part in (self.target, self.original))
        return fmean(target), fmean(original)

    def errors(
        self, before: Mapping[str, SourceResult], after: Mapping[str, SourceResult]
    ) -> tuple[float | None, float | None]:
        """Standard errors of the changes of the two means, in nats per token."""

        target, original = (
            [difference(before[source], after[source]).nats_error for source in part]
            for part in (self.target, self.original)
        )
        return error_of_mean(target), error_of_mean(original)


def compare_runs(
    runs: Mapping[str, Path],
    corpus: Path,
    sources: Sequence[str] = (),
    *,
    windows: int = 32,
    tasks: Tasks | None = None,
) -> Comparison:
    """Measure runs of one domain and base, given their folders, on held-out text and on tasks.

    `sources` are globs of files in `corpus` (none: what the runs' recipes hold out); at most `windows` windows of
    each are read. Raises BadRequest if the runs have several domains or bases, or if there is no source of the
    target or none in the base's own language that no run read; Conflict for a folder without a run.
    """
    recipes = [read_run(folder)[0] for folder in runs.values()]
    if len({(recipe.base, recipe.domain) for recipe in recipes}) != 1:
        raise BadRequest("the runs are not all of one base and one domain", param="runs")
    field = _text_field(recipes)
    warn_of_learned(
        find_sources(corpus, _measured(recipes, sources), field),
        [RecipeText(recipe.data.target, recipe.data.original, recipe.data.background) for recipe in recipes],
    )
    base = load_base(recipes[0].base, device=best_device())
    texts = read_heldout(corpus, _measured(recipes, sources), base.tokenizer, WINDOW, windows, text_field=field)
    benchmark = Benchmark(texts, *_parts(list(texts), recipes), tasks or {})
    results, answers = benchmark.measure(Subject(base, Attached(base.model, []), (), "base"))
    losses = {source: result.loss for source, result in results.items()}
    target, original = benchmark.means(losses)
    name = base.name
    del base  # each run loads its own base: never two at once
    return Comparison(
        base=name,
        domain=recipes[0].domain,
        window=WINDOW,
        target_sources=benchmark.target,
        original_sources=benchmark.original,
        base_losses=losses,
        base_target=target,
        base_original=original,
        windows={source: len(text) for source, text in benchmark.texts.items()},
        runs={name: _measure_run(name, folder, benchmark, results, answers) for name, folder in runs.items()},
    )


def write_comparison(comparison: Comparison, runs: Mapping[str, Path], folder: Path) -> list[Path]:
    """Write comparison.json, comparison.md, the Pareto plot and the loss curves of training; return the paths."""
    from nr_serve.evaluate.plots import loss_curves, pareto

    make_folder(folder)
    names = ("comparison.json", "comparison.md", "pareto.svg", "loss.svg")
    as_json, as_page, as_pareto, as_curves = written = [folder / name for name in names]
    write_text(as_json, comparison.to_json())
    write_text(as_page, page(comparison))
    points, shares = comparison.points()
    pareto(as_pareto, points, title=f"{comparison.domain}: learned and forgotten, as shares of {shares}")
    curves = {name: training_losses(run / checkpoints.LOG) for name, run in runs.items()}
    loss_curves(as_curves, {name: curve for name, curve in curves.items() if curve}, title="LM loss in training")
    return written


def check_sources(recipes: Sequence[Recipe], corpus: Path, sources: Sequence[str] = ()) -> None:
    """Raise the errors that `compare_runs` would raise for its sources, before the runs are trained."""
    found = find_sources(corpus, _measured(recipes, sources), _text_field(recipes))
    _parts([source.name for source in found], recipes)


def _text_field(recipes: Sequence[Recipe]) -> str:
    """The field that holds the text of JSON lines and of data sets. Raises BadRequest if the runs differ in it."""
    fields = sorted({recipe.data.text_field for recipe in recipes})
    if len(fields) != 1:
        raise BadRequest(f"the runs read their text from different fields: {', '.join(fields)}", param="runs")
    return fields[0]


def _measured(recipes: Sequence[Recipe], sources: Sequence[str]) -> list[str]:
    """The sources asked for or, if none are, those that the recipes hold out."""
    return list(sources) or list(dict.fromkeys(entry for recipe in recipes for entry in recipe.data.heldout))


def _parts(texts: Sequence[str], recipes: Sequence[Recipe]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sources of the target, and sources in the base's own language that no run read. Raises BadRequest."""
    target = tuple(name for name in texts if all(recipe.owns(name) for recipe in recipes))
    original = tuple(name for name in texts if all(_is_unread_original(name, recipe) for recipe in recipes))
    for what, found in (("the target", target), ("the base's own language, unread by every run,", original)):
        if not found:
            raise BadRequest(f"no source of {what} is among those to measure", param="source")
    return target, original


def _is_unread_original(source: str, recipe: Recipe) -> bool:
    """Whether a source is in the base's own language and not in the recipe's training text."""
    data = recipe.data
    is_original = names_language(data.original, language_of(source))
    parts = (data.target, data.original, data.background)
    return is_original and not any(names_source(part, source) for part in parts)


def _measure_run(
    name: str,
    folder: Path,
    benchmark: Benchmark,
    base_results: Mapping[str, SourceResult],
    base_answers: Mapping[str, Sequence[Answer]],
) -> RunReport:
    recipe, base, learner, saved = load_run(folder, "float32")  # like the base
    results, answers = benchmark.measure(Subject(base, learner.attached, _versions(saved, learner), f"run {name}"))
    losses = {source: result.loss for source, result in results.items()}
    target, original = benchmark.means(losses)
    tokens = saved.step * recipe.run.batch_tokens
    target_error, original_error = benchmark.errors(base_results, results)
    return RunReport(
        method=recipe.method,
        tokens=tokens,
        parameters=sum(p.numel() for p in learner.trained().values()),
        lr=recipe.run.lr,
        seconds=training_seconds(folder / checkpoints.LOG, tokens),
        losses=losses,
        fired={source: result.fired[0] for source, result in results.items() if result.fired},
        target=target,
        target_error=target_error,
        original=original,
        original_error=original_error,
        tasks={task: score(base_answers[task], found) for task, found in answers.items()},
    )


def _versions(saved: checkpoints.Checkpoint, learner: Learner) -> tuple[str, ...]:
    """Identifies a run's recipe and the weights that are measured, for the cache."""
    weights = digest(tensor.cpu() for _, tensor in sorted(learner.trained_state().items()))
    return (json.dumps(saved.recipe, sort_keys=True), weights)
