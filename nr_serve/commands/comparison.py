"""compare: training runs beside each other."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from nr_serve.commands.command import Command, check_flags
from nr_serve.commands.table import table
from nr_serve.errors import BadRequest


class Compare(Command):
    """Measure training runs of one domain: what each learned, and what it forgot, beside finetuning."""

    runs: CliPositionalArg[list[Path]] = Field(description="the runs' folders")
    corpus: Path = Field(description="folder of text, as fetch-corpus leaves it")
    source: list[str] = Field(
        [], description="files of --corpus to measure on; may be repeated (default: what the recipes hold out)"
    )
    windows: int = Field(32, ge=1, description="most windows per source")
    tasks: list[Path] = Field([], description="multiple-choice tasks, .jsonl files or folders; may be repeated")
    limit: int | None = Field(None, ge=1, description="most examples a task, the first ones (default: all)")
    json_: bool = Field(False, alias="json", description="print JSON")
    out: Path | None = Field(None, description="folder for the comparison as JSON and Markdown, and its plots")


def compare(command: Compare) -> int:
    """Measure; print tables or JSON; write the pages."""
    from nr_serve.disk import make_folder
    from nr_serve.evaluate.compare import compare_runs, write_comparison
    from nr_serve.evaluate.comparison_report import tables
    from nr_serve.evaluate.tasks import read_tasks

    runs = {os.path.basename(os.path.realpath(folder)): folder for folder in command.runs}
    if len(runs) < len(command.runs):
        raise BadRequest("two runs have the same name", param="runs")
    check_flags(command, {"limit": "tasks"}, {"tasks": "lm_eval", "out": "matplotlib"})
    if command.out is not None:
        make_folder(command.out)
    examples = read_tasks(command.tasks, command.limit)
    comparison = compare_runs(runs, command.corpus, command.source, windows=command.windows, tasks=examples)
    if command.json_:
        print(comparison.to_json())
    else:
        print("\n\n".join("\n".join(table(rows)) for rows in tables(comparison)))
    if command.out is not None:
        write_comparison(comparison, runs, command.out)
    return 0
