"""Measured reports as text: rows for the terminal, Markdown for the docs, JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic_core import to_jsonable_python

from nr_serve.evaluate.difference import percent
from nr_serve.evaluate.heldout import Report
from nr_serve.evaluate.interference import Interference, Summary, Worst
from nr_serve.evaluate.switches import SwitchReport
from nr_serve.evaluate.tasks import TaskScores

Rows = list[list[str]]
"""A header row, then one row per entry."""

SUMMARY = {
    "own_against_alone": "change on own text, all attached against its adapter alone",
    "original_against_base": "change on the base's language, against the base",
    "seen_against_base": "change on other languages in a recipe, against the base",
    "unseen_against_base": "change on languages in no recipe, against the base",
    "near_against_base": "change on close relatives, against the base",
    "original_fired": "fired on the base's language",
    "foreign_fired": "fired on other languages",
    "near_fired": "fired on close relatives",
}
"""Description of each line of the summary, by field of `Summary`."""


def heldout_rows(report: Report) -> Rows:
    """One row per source: losses without and with the adapters."""
    header = ["SOURCE", "TOKENS", "BASE LOSS", "LOSS", "CHANGE", *_fired_header(report)]
    rows = [
        [name, f"{s.tokens:,}", f"{s.before:.4f}", f"{s.after:.4f}", str(s.difference), *_fired(report, name)]
        for name, s in report.sources.items()
    ]
    return [header, *rows]


def interference_rows(measured: Interference) -> Rows:
    """The interference matrix, one row per source: losses with no, own and all adapters, and who fired with all."""
    report = measured.report
    header = ["SOURCE", "ROLE", "TOKENS", "BASE", "OWN ALONE", "ALL", "ALL / BASE", "ALL / ALONE"]
    rows = []
    for name in measured.ordered():
        source, alone = report.sources[name], measured.alone.get(name)
        role = measured.roles[name]
        rows.append(
            [
                name,
                " ".join([role.kind, *(role.own or role.near)]),
                f"{source.tokens:,}",
                f"{source.before:.4f}",
                f"{alone.loss:.4f}" if alone else "-",
                f"{source.after:.4f}",
                str(source.difference),
                str(alone.difference) if alone else "-",
                *_fired(report, name),
            ]
        )
    return [[*header, *_fired_header(report)], *rows]


def summary_rows(summary: Summary) -> Rows:
    """One row for the worst value of every kind that was measured."""
    rows = [
        [text, _worst(worst), _where(worst)]
        for name, text in SUMMARY.items()
        if (worst := getattr(summary, name)) is not None
    ]
    return [["WORST", "VALUE", "WHERE"], *rows]


def switch_rows(report: SwitchReport) -> Rows:
    """One row per adapter: rates in the three stretches, tokens until it opens and shuts, changes of the loss."""
    header = ["ADAPTER", "WINDOWS", "FIRED BEFORE", "FIRED IN", "FIRED AFTER", "TOKENS TO OPEN", "TOKENS TO SHUT"]
    rows = [
        [
            name,
            f"{s.windows:,}",
            *(f"{rate:.2%}" for rate in (s.steady.original, s.steady.own, s.steady.original_again)),
            *("never" if tokens is None else f"{tokens}" for tokens in (s.tokens_to_open, s.tokens_to_shut)),
            str(s.own_difference),
            f"{s.before:.4f}",
            f"{s.after:.4f}",
            str(s.difference),
        ]
        for name, s in report.adapters.items()
    ]
    return [[*header, "CHANGE IN", "BASE LOSS AFTER", "LOSS AFTER", "CHANGE AFTER"], *rows]


def task_rows(tasks: Mapping[str, TaskScores]) -> Rows:
    """Two rows per task: accuracy, and accuracy normalised by length."""
    header = ["TASK", "EXAMPLES", "SCORE", "BASE", "ATTACHED", "CHANGE"]
    rows = [
        [
            name,
            f"{task.examples:,}",
            score,
            str(base),
            str(attached),
            percent(change.value, change.standard_error, "+"),
        ]
        for name, task in tasks.items()
        for score in ("acc", "acc_norm")
        for base, attached, change in [(getattr(s, score) for s in (task.base, task.attached, task.change))]
    ]
    return [header, *rows]


def markdown(rows: Rows) -> list[str]:
    """Rows as the lines of a Markdown table; columns of numbers are aligned right."""
    header, *body = ([cell.replace("|", "&#124;") for cell in row] for row in rows)
    rules = ["---:" if all(row[i][0] in "+-0123456789" for row in body) else "---" for i in range(len(header))]
    return [
        f"| {' | '.join(header).lower()} |",
        f"|{'|'.join(rules)}|",
        *(f"| {' | '.join(row)} |" for row in body),
    ]


def interference_page(measured: Interference, links: Sequence[str] = ()) -> str:
    """The interference report as a page of Markdown; `links` are lines that show its plots."""
    report = measured.report
    versions = ", ".join(f"`{name}` ({version})" for name, version in report.adapters.items())
    lines = [
        "# Adapters attached together",
        "",
        f"{versions} on `{report.base}`. Held-out loss in nats per token, windows of {report.window} tokens. "
        "*Fired* is the share of token-layers on which an adapter's blocks acted, with all attached. "
        "After ±: the standard error of the change, paired over windows.",
        "",
        *markdown(summary_rows(measured.summary())),
        "",
        *markdown(interference_rows(measured)),
        *(line for link in links for line in ("", link)),
    ]
    return "\n".join(lines) + "\n"


def document_json(document: object) -> str:
    """A report as JSON; NaN, which JSON lacks, becomes null."""
    return json.dumps(to_jsonable_python(document, inf_nan_mode="null"), indent=1, sort_keys=True)


def links(plots: Mapping[str, Path], page: Path) -> list[str]:
    """Lines of Markdown that show plots on a page, given by caption."""
    places = {caption: Path(os.path.relpath(path, page.parent)).as_posix() for caption, path in plots.items()}
    return [f"![{caption}]({place})" for caption, place in places.items()]


def _fired_header(report: Report) -> list[str]:
    return [f"FIRED {name}" for name in report.adapters]


def _fired(report: Report, source: str) -> list[str]:
    return [f"{report.sources[source].fired[adapter]:.2%}" for adapter in report.adapters]


def _worst(worst: Worst) -> str:
    if worst.adapter is not None:  # a share fired, not a change of the loss
        return f"{worst.value:.2%}"
    return percent(worst.value, worst.standard_error, "+")


def _where(worst: Worst) -> str:
    return worst.source if worst.adapter is None else f"{worst.adapter} on {worst.source}"
