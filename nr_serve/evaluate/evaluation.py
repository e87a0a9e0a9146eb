"""What `nr-serve evaluate` measures of adapters, as asked: on text, where its language switches, and on tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nr_serve.disk import write_text
from nr_serve.errors import BadRequest
from nr_serve.evaluate.card import card
from nr_serve.evaluate.heldout import Report, attach_all, each_alone
from nr_serve.evaluate.hosted import Hosted, load
from nr_serve.evaluate.interference import Interference, interference
from nr_serve.evaluate.roles import assign_roles, recipe_text, warn_of_learned
from nr_serve.evaluate.switches import SwitchReport, switch_texts, switches
from nr_serve.evaluate.tables import (
    Rows,
    heldout_rows,
    interference_page,
    interference_rows,
    links,
    summary_rows,
    switch_rows,
    task_rows,
)
from nr_serve.evaluate.tasks import Example, TaskScores, score_tasks
from nr_serve.evaluate.variants import variant_rows
from nr_serve.train.frozen_base import check_window
from nr_serve.train.text import read_heldout
from nr_serve.train.text.frames import find_frames
from nr_serve.train.text.lead_in import check_chat, in_chat
from nr_serve.train.text.read import CLASS_TOKENS
from nr_serve.train.text.sources import find_sources

Attach = Literal["all", "alone", "both"]
"""How adapters are attached to read text: all at once, each alone, or both (to measure interference)."""


@dataclass(frozen=True)
class Plots:
    """Files of plots, by caption."""

    gates: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    """Plots of each adapter's gates: adapter name -> caption -> file."""
    matrix: Mapping[str, Path] = field(default_factory=dict)
    switches: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation; None or empty for what was not asked for."""

    hosted: Hosted
    report: Report | None
    """Results on text with all adapters attached."""
    interference: Interference | None
    """How the adapters affect each other; its report is `report`."""
    alone: Mapping[str, Report]
    """Results on text with one adapter attached, by the adapter's name."""
    switched: SwitchReport | None
    tasks: Mapping[str, TaskScores]
    chat: bool
    """Whether the text was put in the base's chat template."""

    def document(self) -> dict[str, Any]:
        """All results as plain values, for JSON."""
        text = self.interference or self.report
        document: dict[str, Any] = {"adapters": self.hosted.versions} if text is None else text.document()
        if self.chat:
            document |= {"chat": True}
        if self.alone:
            document |= {"alone": {name: report.document() for name, report in self.alone.items()}}
        if self.switched is not None:
            document |= {"switches": self.switched.document()}
        if self.tasks:
            document |= {"tasks": {name: asdict(scores) for name, scores in self.tasks.items()}}
        return document

    def tables(self) -> list[Rows]:
        """All results as tables."""
        tables = []
        if self.interference is not None:
            tables += [interference_rows(self.interference), summary_rows(self.interference.summary())]
        elif self.report is not None:
            tables += [heldout_rows(self.report)]
        if self.alone:
            tables += [variant_rows(self.alone, self.hosted.adapters)]
        if self.switched is not None:
            tables += [switch_rows(self.switched)]
        if self.tasks:
            tables += [task_rows(self.tasks)]
        return tables

    def plot(self, folder: Path, suffix: str) -> Plots:
        """Write plots of who fires on what, in which layer, and at language switches; returns the files."""
        reports = dict(self.alone)
        if self.report is not None:
            reports = dict.fromkeys(self.hosted.names, self.report)
        if not reports:
            return Plots()
        from nr_serve.evaluate.report_plots import plot_gates, plot_matrix, plot_switches  # matplotlib: an extra

        sources = next(iter(reports.values())).sources  # every report is on the same text
        roles = assign_roles(sources, self.hosted.adapters, {})
        gates = {name: plot_gates(folder, report, roles, name, suffix) for name, report in reports.items()}
        switched = {} if self.switched is None else plot_switches(folder, self.switched, suffix)
        matrix = {} if self.interference is None else plot_matrix(folder, self.interference, suffix)
        return Plots(gates, matrix, switched)

    def write_card(self, path: Path, plots: Plots) -> None:
        """Write the first adapter's card, with links to its plots, if text was measured with all attached."""
        if self.report is not None:
            first = self.hosted.names[0]
            shown = links(plots.gates.get(first, {}), path)
            write_text(path, card(first, self.hosted.adapters[first], self.report, tasks=self.tasks, links=shown))

    def write_page(self, path: Path, plots: Plots) -> None:
        """Write the interference report, with links to the plots, if interference was measured."""
        if self.interference is not None:
            shown = dict(plots.matrix) | dict(plots.switches)
            for own in plots.gates.values():
                shown |= own
            write_text(path, interference_page(self.interference, links(shown, path)))


def evaluate(
    files: Sequence[Path],
    model: str,
    corpus: Path | None,
    sources: Sequence[str],
    tasks: Mapping[str, Sequence[Example]],
    *,
    window: int,
    windows: int,
    dtype: str = "float32",
    text_field: str = "text",
    attach: Attach = "all",
    near: Mapping[str, Sequence[str]],
    chat: bool = False,
    stretch: int | None = None,
) -> Evaluation:
    """Measure the adapters in `files` on the base `model`, held in `dtype`.

    Missing files are reported before anything is measured.
    The text is up to `windows` windows of `window` tokens from each file of `corpus` that matches one of the globs
    `sources`; a document of JSON lines is in the field `text_field`. With `attach` "both", `near` names, for a
    language, its close relatives, which are summarised apart. `chat`: put each window in the base's chat template.
    `stretch`: tokens between switches of language, if switches are measured.
    """
    if near and attach != "both":
        raise BadRequest(
            "relatives are summed up only where adapters are attached both at once and alone", param="near"
        )
    found = []
    if corpus is not None:
        found = find_sources(corpus, sources, text_field)  # a wrong name is reported before the base is loaded
        check_window(model, window, "--window")
        check_window(model, 3 * (stretch or 0), "three times --stretch")
    hosted = load(files, model, dtype)
    warn_of_learned(found, [recipe_text(adapter.info) for adapter in hosted.adapters.values()])
    frames = find_frames(hosted.base.tokenizer, chat=chat)
    if chat:
        check_chat(frames, window)
    report, disturbed, alone, switching = None, None, {}, {}
    if corpus is not None:
        read = partial(read_heldout, corpus, sources, hosted.base.tokenizer, text_field=text_field)
        if stretch is not None:
            count = max(windows * len(found), CLASS_TOKENS // (2 * stretch))
            switching = switch_texts(hosted, read(2 * stretch, count), windows, len(frames.beginning))
        texts = read(window, windows)
        if chat:
            texts = {name: in_chat(text, frames) for name, text in texts.items()}
        if attach == "alone":
            alone = each_alone(hosted, texts)
        elif attach == "all":
            report = attach_all(hosted, texts)
        else:
            disturbed = interference(hosted, texts, near)
            report = disturbed.report
    switched = switches(hosted, switching) if switching else None
    return Evaluation(hosted, report, disturbed, alone, switched, score_tasks(hosted, tasks), chat)
