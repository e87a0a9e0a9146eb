"""Training runs beside each other, as values and as tables: what each learned of its target, and what it forgot.

Let T be the mean loss over the target's sources, and E that over sources of the base's own language that no run
read. Then learned = (base_T - run_T) / (base_T - finetune_T) and forgotten = (run_E - base_E) /
(finetune_E - base_E), as in the tables of arXiv 2410.02744. Without a finetune run both are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from nr_serve.evaluate.difference import percent
from nr_serve.evaluate.pareto import Point
from nr_serve.evaluate.tables import Rows, document_json, markdown
from nr_serve.evaluate.tasks import Estimate, TaskScores
from nr_serve.train.entries import language_of


@dataclass(frozen=True)
class RunReport:
    """Measurements of one run."""

    method: str
    tokens: int
    """Training tokens of all its windows and steps."""
    parameters: int
    """Number of trained parameters."""
    lr: float
    seconds: float
    """Training time, from its log."""
    losses: Mapping[str, float]
    """Held-out loss by source, nats per token."""
    fired: Mapping[str, float]
    """Share of token-layers that fired, by source; empty for a method without blocks."""
    target: float
    """Mean loss over the target's sources."""
    target_error: float | None
    """Standard error of `target`'s change against the base, paired over windows; None if a source has one."""
    original: float
    """Mean loss over sources of the base's own language that no run read."""
    original_error: float | None
    """Standard error of `original`'s change against the base."""
    tasks: Mapping[str, TaskScores]
    """Scores of the base and (as `attached`) of the run, by task."""


@dataclass(frozen=True)
class Comparison:
    """The base and several runs on it, measured on the same text."""

    base: str
    domain: str
    window: int
    """Tokens per window."""
    target_sources: tuple[str, ...]
    original_sources: tuple[str, ...]
    """Sources of the base's own language that no run read."""
    base_losses: Mapping[str, float]
    base_target: float
    base_original: float
    windows: Mapping[str, int]
    """Number of windows read, by source."""
    runs: Mapping[str, RunReport]

    def learned(self, name: str) -> float | None:
        """Share of what finetuning learned; None without a finetune run that learned."""
        tuned = self._finetune()
        return None if tuned is None else _share(self.base_target, self.runs[name].target, tuned.target)

    def forgotten(self, name: str) -> float | None:
        """Share of what finetuning forgot; None without a finetune run that forgot."""
        tuned = self._finetune()
        return None if tuned is None else _share(-self.base_original, -self.runs[name].original, -tuned.original)

    def points(self) -> tuple[list[Point], str]:
        """Forgotten and learned as points of a Pareto plot, and the name of the unit.

        Both are shares of what finetuning forgot and learned. Without a finetune run, or if it forgot or learned
        nothing, they are shares of the base's losses.
        """
        shares = [(name, self.forgotten(name), self.learned(name)) for name in self.runs]
        points = [Point(name, f, learned) for name, f, learned in shares if f is not None and learned is not None]
        if points:
            return points, "finetuning's"
        points = [
            Point(name, run.original / self.base_original - 1, 1 - run.target / self.base_target)
            for name, run in self.runs.items()
        ]
        return points, "the base's loss"

    def _finetune(self) -> RunReport | None:
        """The finetune run that learned most; None if there is none."""
        tuned = [run for run in self.runs.values() if run.method == "finetune"]
        return min(tuned, key=lambda run: run.target) if tuned else None

    @property
    def unread(self) -> str:
        """Label of the mean over `original_sources`, such as `en unread`."""
        return f"{', '.join(sorted({language_of(source) for source in self.original_sources}))} unread"

    def to_json(self) -> str:
        """All results as one JSON document."""
        shares = {name: {"learned": self.learned(name), "forgotten": self.forgotten(name)} for name in self.runs}
        return document_json(asdict(self) | {"shares": shares})


def _share(before: float, after: float, finetuned: float) -> float | None:
    """How far `after` is on the way from `before` down to `finetuned`; None if that is not below `before`."""
    return (before - after) / (before - finetuned) if before > finetuned else None


def tables(comparison: Comparison) -> list[Rows]:
    """Tables of the runs, of the sources, and of the tasks if there are any."""
    found = [run_rows(comparison), source_rows(comparison)]
    return [*found, run_task_rows(comparison)] if _tasks(comparison) else found


def run_rows(comparison: Comparison) -> Rows:
    """A row for the base, and one row per run."""
    header = ["RUN", "METHOD", "LR", "TOKENS", "TRAINED PARAMETERS", "MINUTES", "TARGET", comparison.unread.upper()]
    losses = [f"{comparison.base_target:.4f}", f"{comparison.base_original:.4f}"]
    base = ["base", "-", "-", "0", "0", "0", *losses, "-", "-"]
    return [[*header, "LEARNED", "FORGOTTEN"], base, *(_row(comparison, name) for name in comparison.runs)]


def _row(comparison: Comparison, name: str) -> list[str]:
    run = comparison.runs[name]
    shares = (comparison.learned(name), comparison.forgotten(name))
    return [
        name,
        run.method,
        f"{run.lr:g}",
        f"{run.tokens:,}",
        f"{run.parameters:,}",
        f"{run.seconds / 60:.1f}",
        _loss(run.target, run.target_error),
        _loss(run.original, run.original_error),
        *("-" if share is None else f"{share:.1%}" for share in shares),
    ]


def _loss(loss: float, error: float | None) -> str:
    return f"{loss:.4f}" + ("" if error is None else f" ± {error:.4f}")


def source_rows(comparison: Comparison) -> Rows:
    """Held-out loss by source and run; the sources that the means are over come first."""
    means = {"target": comparison.target_sources, comparison.unread: comparison.original_sources}
    listed = [(source, mean) for mean, sources in means.items() for source in sources]
    listed += [(source, "-") for source in comparison.base_losses if source not in dict(listed)]
    body = [
        [
            source,
            mean,
            f"{comparison.windows[source]}",
            f"{comparison.base_losses[source]:.4f}",
            *(f"{run.losses[source]:.4f}" for run in comparison.runs.values()),
        ]
        for source, mean in listed
    ]
    return [["SOURCE", "PART OF", "WINDOWS", "BASE", *(name.upper() for name in comparison.runs)], *body]


def run_task_rows(comparison: Comparison) -> Rows:
    """Two rows per task: accuracy, and accuracy normalised by length; in brackets the change from the base."""
    body = [
        [task, f"{scores.examples:,}", which, str(getattr(scores.base, which))]
        + [_scored(run.tasks[task], which) for run in comparison.runs.values()]
        for task, scores in _tasks(comparison).items()
        for which in ("acc", "acc_norm")
    ]
    return [["TASK", "EXAMPLES", "SCORE", "BASE", *(name.upper() for name in comparison.runs)], *body]


def _tasks(comparison: Comparison) -> Mapping[str, TaskScores]:
    """The tasks, with the base's scores."""
    return next(iter(comparison.runs.values())).tasks


def _scored(scores: TaskScores, which: str) -> str:
    score: Estimate = getattr(scores.attached, which)
    change: Estimate = getattr(scores.change, which)
    return f"{score.value:.2%} ({percent(change.value, change.standard_error, '+')})"


def page(comparison: Comparison) -> str:
    """The comparison as a page of Markdown."""
    lines = [
        f"# {comparison.domain}: training methods compared",
        "",
        f"Held-out loss on `{comparison.base}` in nats per token, windows of {comparison.window} tokens. Target: "
        f"the mean over {', '.join(comparison.target_sources)}. {comparison.unread.capitalize()}: the mean over "
        f"{', '.join(comparison.original_sources)}, which no run read. Learned and forgotten are shares of what "
        "finetuning learned and forgot. After ±: one standard error of the change against the base, over windows.",
        *(line for table in tables(comparison) for line in ("", *markdown(table))),
    ]
    return "\n".join(lines) + "\n"
