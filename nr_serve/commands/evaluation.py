"""evaluate: measuring adapters on held-out text and on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from nr_serve.commands.command import Command, check_flags
from nr_serve.commands.table import table
from nr_serve.config import spelled
from nr_serve.errors import BadRequest
from nr_serve.train.entries import DATASETS


class Evaluate(Command):
    """Measure adapters beside the base: loss and fired gates on text, answers to tasks."""

    files: CliPositionalArg[list[Path]] = Field(
        description="adapter files; all are attached unless a flag says otherwise"
    )
    corpus: Path | None = Field(None, description="folder of text, as fetch-corpus leaves it")
    source: list[str] = Field(["*.heldout.txt"], description="files of --corpus to measure on; may be repeated")
    text_field: str = Field("text", min_length=1, description="the field of JSONL lines that holds a document")
    model: str = Field("default", description="base model: a local folder, a hub name, or `default`")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type the base computes in; bfloat16 takes half the memory, and is less exact"
    )
    window: int = Field(256, ge=8, le=1_000_000, description="tokens read at once")
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
    chat: bool = Field(
        False,
        description="put each window in the base's chat template: a tenth of it as the user's words, the rest as "
        "the assistant's; the template's own tokens are measured too",
    )
    switches: bool = Field(
        False,
        description="also measure how fast each adapter's gates open and shut where a text switches language",
    )
    stretch: int = Field(48, ge=8, le=100_000, description="tokens before, between and after the switches")
    tasks: list[Path] = Field([], description="multiple-choice tasks, .jsonl files or folders; may be repeated")
    limit: int | None = Field(None, ge=1, description="most examples a task, the first ones (default: all)")
    json_: bool = Field(False, alias="json", description="print JSON")
    card: Path | None = Field(None, description="file for a page on the first adapter, in Markdown")
    markdown: Path | None = Field(None, description="file for the interference report, in Markdown")
    plots: Path | None = Field(None, description="folder for plots of who fires on what, in which layer, and when")
    plot_format: Literal["svg", "png"] = Field("svg", description="format of the plots")


NEEDS = {
    "source": "corpus",
    "text_field": "corpus",
    "window": "corpus",
    "windows": "corpus",
    "interference": "corpus",
    "alone": "corpus",
    "chat": "corpus",
    "card": "corpus",
    "plots": "corpus",
    "switches": "corpus",
    "stretch": "switches",
    "near": "interference",
    "markdown": "interference",
    "limit": "tasks",
    "plot_format": "plots",
}
"""Flag -> the flag without which it has no effect."""

ALL_ATTACHED = ("interference", "card", "tasks")
"""Flags that measure all adapters attached together, which `alone` does not do."""

PLAIN_TEXT = ("switches", "tasks", "card", "markdown", "plots")
"""Flags that measure plain text, or write pages and plots of it, which `chat` does not measure."""

PACKAGES = {"plots": "matplotlib", "tasks": "lm_eval"}
"""Flag -> the package it needs, in addition to what every command needs."""


def evaluate(command: Evaluate) -> int:
    """Measure; print tables or JSON; write the card, the page and the plots."""
    from nr_serve.evaluate.evaluation import Plots
    from nr_serve.evaluate.evaluation import evaluate as run
    from nr_serve.evaluate.tables import document_json
    from nr_serve.evaluate.tasks import read_tasks

    _check(command)
    near = _near(command.near)
    measured = run(
        command.files,
        command.model,
        command.corpus,
        command.source,
        read_tasks(command.tasks, command.limit),
        dtype=command.dtype,
        window=command.window,
        windows=command.windows,
        attach="alone" if command.alone else "both" if command.interference else "all",
        text_field=command.text_field,
        near=near,
        chat=command.chat,
        stretch=command.stretch if command.switches else None,
    )
    if command.json_:
        print(document_json(measured.document()))
    else:
        print("\n\n".join("\n".join(table(rows)) for rows in measured.tables()))
    plots = Plots() if command.plots is None else measured.plot(command.plots, f".{command.plot_format}")
    if command.card is not None:
        measured.write_card(command.card, plots)
    if command.markdown is not None:
        measured.write_page(command.markdown, plots)
    return 0


def _check(command: Evaluate) -> None:
    """Before any long work, refuse flags that have no effect, and files and folders that cannot be written."""
    from nr_serve.disk import check_output, make_folder
    from nr_serve.evaluate.card import check_card
    from nr_serve.evaluate.tasks import task_files
    from nr_serve.neutral.format import naming, read_info
    from nr_serve.train.text.sources import find_files

    for number, file in enumerate(command.files):
        with naming(file):
            info = read_info(file)
            if command.card is not None and number == 0:
                check_card(info)
    if command.corpus is None and not command.tasks:
        raise BadRequest("nothing to measure on: give --corpus, --tasks or both", param="corpus")
    check_flags(command, NEEDS, PACKAGES)
    for flag in ALL_ATTACHED:
        if command.alone and getattr(command, flag):
            raise BadRequest(
                f"{spelled(flag)} is of all adapters attached: it does not go with --alone", param=flag
            )
    for flag in PLAIN_TEXT:
        if command.chat and getattr(command, flag):
            raise BadRequest(f"{spelled(flag)} is of plain text: it does not go with --chat", param=flag)
    used = [*command.files, *task_files(command.tasks)]
    if command.corpus is not None:
        used += find_files(command.corpus, [each for each in command.source if not each.startswith(DATASETS)])
    for page in (command.card, command.markdown):
        if page is not None:
            check_output(page, used)
            if page.exists() and page.suffix != ".md":
                raise BadRequest(f"cannot write {page}: it is there already, and its name does not end in .md")
            used.append(page)
    if command.plots is not None:
        make_folder(command.plots)


def _near(marks: Sequence[str]) -> dict[str, list[str]]:
    near: dict[str, list[str]] = {}
    for mark in marks:
        language, _, relative = mark.partition("=")
        if not language or not relative:
            raise BadRequest(f"--near takes LANGUAGE=RELATIVE, such as nb=da, not {mark!r}", param="near")
        if language == relative:
            raise BadRequest(f"--near {mark}: a language is no relative of itself", param="near")
        near.setdefault(language, []).append(relative)
    return near
