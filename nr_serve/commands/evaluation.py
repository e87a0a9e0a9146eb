"""evaluate: measuring adapters on held-out text and on tasks."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from errno import EISDIR
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from nr_serve.commands.base import Command
from nr_serve.commands.remote import table
from nr_serve.errors import BadRequest

if TYPE_CHECKING:
    from nr_serve.evaluate.heldout import Report
    from nr_serve.evaluate.hosted import Hosted
    from nr_serve.evaluate.interference import Interference
    from nr_serve.evaluate.switches import SwitchReport, SwitchText
    from nr_serve.evaluate.tasks import TaskScores


class Evaluate(Command):
    """Measure adapters' loss and fired shares on text, and answers to tasks, beside the base's own."""

    files: CliPositionalArg[list[Path]] = Field(description="adapter files, all attached at once")
    corpus: Path | None = Field(None, description="folder of text, as fetch-corpus leaves it")
    source: list[str] = Field(["*.heldout.txt"], description="which of its files to measure on; may be repeated")
    model: str = Field("default", description="base model: a local folder, a hub name, or `default`")
    window: int = Field(256, ge=8, description="tokens read at once")
    windows: int = Field(32, ge=1, description="most windows a source")
    interference: bool = Field(
        False, description="also measure each text with its own adapter alone, and sum up who disturbs whom"
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

PACKAGES = {"plots": "matplotlib", "tasks": "lm_eval"}
"""Flag -> the package it needs besides those of every command."""


def evaluate(command: Evaluate) -> int:
    """Measure; print tables or JSON; write the card, the page and the plots."""
    from nr_serve.evaluate.hosted import load
    from nr_serve.evaluate.switches import switches
    from nr_serve.evaluate.tasks import read_tasks, score_tasks

    _check(command)
    near = _near(command.near)
    examples = read_tasks(command.tasks, command.limit)
    hosted = load(command.files, command.model)
    switching = _read_switches(command, hosted)
    report, together = _measure_text(command, hosted, near)
    switched = switches(hosted, switching) if switching else None
    tasks = score_tasks(hosted, examples) if examples else {}
    _print(command, hosted, report, together, switched, tasks)
    _write_pages(command, hosted, report, together, tasks)
    if switched is not None and command.plots is not None:
        from nr_serve.evaluate.report_plots import plot_switches

        plot_switches(command.plots, switched, f".{command.plot_format}")
    return 0


def _read_switches(command: Evaluate, hosted: Hosted) -> dict[str, SwitchText]:
    """The text of the switches, if they are asked for: what is missing is said before anything is measured."""
    from nr_serve.evaluate.switches import SUPPLY, switch_texts
    from nr_serve.train.text import read_heldout

    if command.corpus is None or not command.switches:
        return {}
    count = SUPPLY * command.windows
    stretches = read_heldout(command.corpus, command.source, hosted.base.tokenizer, command.stretch, count)
    return switch_texts(hosted, stretches, command.windows)


def _measure_text(
    command: Evaluate, hosted: Hosted, near: Mapping[str, Sequence[str]]
) -> tuple[Report | None, Interference | None]:
    from nr_serve.evaluate.heldout import attach_all
    from nr_serve.evaluate.interference import interference
    from nr_serve.train.text import read_heldout

    if command.corpus is None:
        return None, None
    texts = read_heldout(command.corpus, command.source, hosted.base.tokenizer, command.window, command.windows)
    if not command.interference:
        return attach_all(hosted, texts), None
    together = interference(hosted, texts, near)
    return together.report, together


def _print(
    command: Evaluate,
    hosted: Hosted,
    report: Report | None,
    together: Interference | None,
    switched: SwitchReport | None,
    tasks: Mapping[str, TaskScores],
) -> None:
    from nr_serve.evaluate.tables import heldout_rows, interference_rows, summary_rows, switch_rows, task_rows

    if command.json_:
        measured = together or report
        document: dict[str, Any] = {"adapters": hosted.versions} if measured is None else measured.document()
        if switched is not None:
            document |= {"switches": switched.document()}
        if tasks:
            document |= {"tasks": {name: asdict(scores) for name, scores in tasks.items()}}
        print(json.dumps(document, indent=1, sort_keys=True))
        return
    tables = []
    if together is not None:
        tables += [interference_rows(together), summary_rows(together.summary())]
    elif report is not None:
        tables += [heldout_rows(report)]
    if switched is not None:
        tables += [switch_rows(switched)]
    if tasks:
        tables += [task_rows(tasks)]
    print("\n\n".join("\n".join(table(rows)) for rows in tables))


def _write_pages(
    command: Evaluate,
    hosted: Hosted,
    report: Report | None,
    together: Interference | None,
    tasks: Mapping[str, TaskScores],
) -> None:
    from nr_serve.evaluate.card import card
    from nr_serve.evaluate.tables import interference_page, links

    if report is None:
        return
    gates, matrix = _write_plots(command, hosted, report, together)
    if command.card is not None:
        first = hosted.names[0]
        page = card(
            first, hosted.adapters[first], report, tasks=tasks, links=links(gates.get(first, {}), command.card)
        )
        _write(command.card, page)
    if command.markdown is not None and together is not None:
        shown = matrix | {caption: path for plots in gates.values() for caption, path in plots.items()}
        _write(command.markdown, interference_page(together, links(shown, command.markdown)))


def _write_plots(
    command: Evaluate, hosted: Hosted, report: Report, together: Interference | None
) -> tuple[dict[str, dict[str, Path]], dict[str, Path]]:
    """Write the plots asked for: those of each adapter's gates, and the interference matrix."""
    if command.plots is None:
        return {}, {}
    from nr_serve.evaluate.report_plots import plot_gates, plot_matrix
    from nr_serve.evaluate.roles import assign_roles

    suffix = f".{command.plot_format}"
    roles = assign_roles(report.sources, hosted.adapters, {})
    gates = {name: plot_gates(command.plots, report, roles, name, suffix) for name in hosted.names}
    return gates, {} if together is None else plot_matrix(command.plots, together, suffix)


def _check(command: Evaluate) -> None:
    """Refuse, before anything long is done, flags that would do nothing and folders that take no file."""
    given = command.model_fields_set
    if command.corpus is None and not command.tasks:
        raise BadRequest("nothing to measure on: give --corpus, --tasks or both", param="corpus")
    for flag, needed in NEEDS.items():
        if flag in given and getattr(command, flag) and not getattr(command, needed):
            raise BadRequest(f"{_spelled(flag)} does nothing without {_spelled(needed)}", param=flag)
    for flag, module in PACKAGES.items():
        if getattr(command, flag) and find_spec(module) is None:
            raise BadRequest(f"{_spelled(flag)} needs {module}: pip install 'nr-serve[train]'", param=flag)
    for page in (command.card, command.markdown):
        if page is not None:
            _check_page(page)
    if command.plots is not None:
        _make_folder(command.plots)


def _check_page(page: Path) -> None:
    try:
        if page.is_dir():
            raise IsADirectoryError(EISDIR, "Is a directory")
        with tempfile.TemporaryFile(dir=page.parent):
            pass
    except OSError as error:
        raise BadRequest(f"cannot write {page}: {error.strerror}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadRequest(f"cannot write in {folder}: {error.strerror}") from error


def _near(marks: Sequence[str]) -> dict[str, list[str]]:
    near: dict[str, list[str]] = {}
    for mark in marks:
        language, _, relative = mark.partition("=")
        if not language or not relative:
            raise BadRequest(f"--near takes LANGUAGE=RELATIVE, such as nb=da, not {mark!r}", param="near")
        near.setdefault(language, []).append(relative)
    return near


def _spelled(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"cannot write {path}: {error.strerror}") from error
