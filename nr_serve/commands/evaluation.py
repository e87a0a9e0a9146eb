"""evaluate: measuring adapters on held-out text and on tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from nr_serve.commands.base import Command, check_flags, spelled
from nr_serve.commands.table import table
from nr_serve.errors import BadRequest

if TYPE_CHECKING:
    from nr_serve.evaluate.heldout import Report
    from nr_serve.evaluate.hosted import Hosted
    from nr_serve.evaluate.interference import Interference
    from nr_serve.evaluate.switches import SwitchReport, SwitchText
    from nr_serve.evaluate.tables import Rows
    from nr_serve.evaluate.tasks import TaskScores


class Evaluate(Command):
    """Measure adapters' loss and fired shares on text, and answers to tasks, beside the base's own."""

    files: CliPositionalArg[list[Path]] = Field(description="adapter files, all attached at once")
    corpus: Path | None = Field(None, description="folder of text, as fetch-corpus leaves it")
    source: list[str] = Field(["*.heldout.txt"], description="which of its files to measure on; may be repeated")
    model: str = Field("default", description="base model: a local folder, a hub name, or `default`")
    window: int = Field(256, ge=8, description="tokens read at once")
    windows: int = Field(32, ge=1, description="most windows per source")
    interference: bool = Field(
        False, description="also measure each text with its own adapter alone, and sum up who disturbs whom"
    )
    alone: bool = Field(
        False, description="attach one adapter at a time, a row each: to choose among variants, such as carries"
    )
    near: list[str] = Field(
        [], description="LANGUAGE=RELATIVE, such as nb=da: sum up text in a close relative apart; may be repeated"
    )
    switches: bool = Field(
        False,
        description="also measure how fast each adapter's gates open and shut where a text switches language",
    )
    stretch: int = Field(48, ge=8, description="tokens before, between and after the switches")
    tasks: list[Path] = Field([], description="multiple-choice tasks, .jsonl files or folders; may be repeated")
    limit: int | None = Field(None, ge=1, description="most examples a task, the first ones (default: all)")
    json_: bool = Field(False, alias="json", description="print JSON")
    card: Path | None = Field(None, description="file for a page on the first adapter, in Markdown")
    markdown: Path | None = Field(None, description="file for the interference report, in Markdown")
    plots: Path | None = Field(None, description="folder for plots of who fires on what, in which layer, and when")
    plot_format: Literal["svg", "png"] = Field("svg", description="format of the plots")


NEEDS = {
    "source": "corpus",
    "window": "corpus",
    "windows": "corpus",
    "interference": "corpus",
    "alone": "corpus",
    "card": "corpus",
    "plots": "corpus",
    "switches": "corpus",
    "stretch": "switches",
    "near": "interference",
    "markdown": "interference",
    "limit": "tasks",
    "plot_format": "plots",
}
"""Flag -> the flag without which it would do nothing."""

ALL_ATTACHED = ("interference", "card", "tasks")
"""Flags that measure all adapters attached, which `alone` does not."""

PACKAGES = {"plots": "matplotlib", "tasks": "lm_eval"}
"""Flag -> the package it needs besides those of every command."""


@dataclass(frozen=True)
class Measured:
    """What was measured; None or empty where it was not asked for."""

    hosted: Hosted
    report: Report | None
    together: Interference | None
    alone: Mapping[str, Report]
    switched: SwitchReport | None
    tasks: Mapping[str, TaskScores]

    def document(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        text = self.together or self.report
        document: dict[str, Any] = {"adapters": self.hosted.versions} if text is None else text.document()
        if self.alone:
            document |= {"alone": {name: report.document() for name, report in self.alone.items()}}
        if self.switched is not None:
            document |= {"switches": self.switched.document()}
        if self.tasks:
            document |= {"tasks": {name: asdict(scores) for name, scores in self.tasks.items()}}
        return document

    def tables(self) -> list[Rows]:
        """All of it as tables."""
        from nr_serve.evaluate.tables import heldout_rows, interference_rows, summary_rows, switch_rows, task_rows
        from nr_serve.evaluate.variants import variant_rows

        tables = []
        if self.together is not None:
            tables += [interference_rows(self.together), summary_rows(self.together.summary())]
        elif self.report is not None:
            tables += [heldout_rows(self.report)]
        if self.alone:
            tables += [variant_rows(self.alone, self.hosted.adapters)]
        if self.switched is not None:
            tables += [switch_rows(self.switched)]
        if self.tasks:
            tables += [task_rows(self.tasks)]
        return tables


def evaluate(command: Evaluate) -> int:
    """Measure; print tables or JSON; write the card, the page and the plots."""
    _check(command)
    measured = _measure(command)
    if command.json_:
        print(json.dumps(measured.document(), indent=1, sort_keys=True))
    else:
        print("\n\n".join("\n".join(table(rows)) for rows in measured.tables()))
    _write_pages(command, measured, *_write_plots(command, measured))
    return 0


def _measure(command: Evaluate) -> Measured:
    """All that was asked for; what is missing is said before anything is measured."""
    from nr_serve.evaluate.hosted import load
    from nr_serve.evaluate.switches import switches
    from nr_serve.evaluate.tasks import read_tasks, score_tasks

    near = _near(command.near)
    examples = read_tasks(command.tasks, command.limit)
    hosted = load(command.files, command.model)
    switching = _read_switches(command, hosted)
    report, together, alone = _measure_text(command, hosted, near)
    switched = switches(hosted, switching) if switching else None
    return Measured(hosted, report, together, alone, switched, score_tasks(hosted, examples))


def _read_switches(command: Evaluate, hosted: Hosted) -> dict[str, SwitchText]:
    """The text of the switches, if they are asked for."""
    from nr_serve.evaluate.switches import SUPPLY, switch_texts
    from nr_serve.train.text import read_heldout

    if command.corpus is None or not command.switches:
        return {}
    count = SUPPLY * command.windows
    stretches = read_heldout(command.corpus, command.source, hosted.base.tokenizer, command.stretch, count)
    return switch_texts(hosted, stretches, command.windows)


def _measure_text(
    command: Evaluate, hosted: Hosted, near: Mapping[str, Sequence[str]]
) -> tuple[Report | None, Interference | None, dict[str, Report]]:
    from nr_serve.evaluate.heldout import attach_all, each_alone
    from nr_serve.evaluate.interference import interference
    from nr_serve.train.text import read_heldout

    if command.corpus is None:
        return None, None, {}
    texts = read_heldout(command.corpus, command.source, hosted.base.tokenizer, command.window, command.windows)
    if command.alone:
        return None, None, each_alone(hosted, texts)
    if not command.interference:
        return attach_all(hosted, texts), None, {}
    together = interference(hosted, texts, near)
    return together.report, together, {}


def _write_plots(command: Evaluate, measured: Measured) -> tuple[dict[str, dict[str, Path]], dict[str, Path]]:
    """Write the plots asked for; returns those of each adapter's gates, and the interference matrix."""
    reports = dict(measured.alone)
    if measured.report is not None:
        reports = dict.fromkeys(measured.hosted.names, measured.report)
    if command.plots is None or not reports:
        return {}, {}
    from nr_serve.evaluate.report_plots import plot_gates, plot_matrix, plot_switches
    from nr_serve.evaluate.roles import assign_roles

    folder, suffix = command.plots, f".{command.plot_format}"
    sources = next(iter(reports.values())).sources  # every report is of the same text
    roles = assign_roles(sources, measured.hosted.adapters, {})
    gates = {name: plot_gates(folder, report, roles, name, suffix) for name, report in reports.items()}
    if measured.switched is not None:
        plot_switches(folder, measured.switched, suffix)
    return gates, {} if measured.together is None else plot_matrix(folder, measured.together, suffix)


def _write_pages(
    command: Evaluate, measured: Measured, gates: Mapping[str, Mapping[str, Path]], matrix: Mapping[str, Path]
) -> None:
    """Write the card and the interference report, with links to the plots."""
    from nr_serve.disk import write_text
    from nr_serve.evaluate.card import card
    from nr_serve.evaluate.tables import interference_page, links

    hosted = measured.hosted
    if command.card is not None and measured.report is not None:
        first = hosted.names[0]
        shown = links(gates.get(first, {}), command.card)
        write_text(
            command.card, card(first, hosted.adapters[first], measured.report, tasks=measured.tasks, links=shown)
        )
    if command.markdown is not None and measured.together is not None:
        plots = dict(matrix) | {caption: path for own in gates.values() for caption, path in own.items()}
        write_text(command.markdown, interference_page(measured.together, links(plots, command.markdown)))


def _check(command: Evaluate) -> None:
    """Refuse, before anything long is done, flags that would do nothing and places that take no file."""
    from nr_serve.disk import check_file, make_folder

    if command.corpus is None and not command.tasks:
        raise BadRequest("nothing to measure on: give --corpus, --tasks or both", param="corpus")
    check_flags(command, NEEDS, PACKAGES)
    for flag in ALL_ATTACHED:
        if command.alone and getattr(command, flag):
            raise BadRequest(
                f"{spelled(flag)} is of all adapters attached: it does not go with --alone", param=flag
            )
    for page in (command.card, command.markdown):
        if page is not None:
            check_file(page)
    if command.plots is not None:
        make_folder(command.plots)


def _near(marks: Sequence[str]) -> dict[str, list[str]]:
    near: dict[str, list[str]] = {}
    for mark in marks:
        language, _, relative = mark.partition("=")
        if not language or not relative:
            raise BadRequest(f"--near takes LANGUAGE=RELATIVE, such as nb=da, not {mark!r}", param="near")
        near.setdefault(language, []).append(relative)
    return near
