"""An adapter's card: one page of Markdown, made from its file and its measured report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nr_serve.errors import BadAdapterFile
from nr_serve.evaluate.heldout import Report, SourceReport
from nr_serve.evaluate.roles import assign_roles
from nr_serve.evaluate.tables import markdown, task_rows
from nr_serve.evaluate.tasks import TaskScores
from nr_serve.neutral.format import Adapter, AdapterInfo


def check_card(info: AdapterInfo) -> None:
    """Raise BadAdapterFile if the file's recipe or results cannot be shown on a card."""
    try:
        _gate(info)
        _training_rows(info.recipe, info.results)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadAdapterFile("its recipe or its results are not those of a run, so there is no card") from error


def card(
    name: str,
    adapter: Adapter,
    report: Report,
    *,
    tasks: Mapping[str, TaskScores] | None = None,
    links: Sequence[str] = (),
) -> str:
    """The card of `adapter`, which is called `name` in `report`. Text that the adapter learned comes first.

    `links` are lines of Markdown that show its plots.
    """
    info = adapter.info
    lines = [
        f"# {name}",
        "",
        f"An nr-serve adapter that teaches `{info.base}` the language or domain `{info.domain}`. It continues "
        f"text; it makes no assistant of the base. Serve it with `nr-serve load-adapter {name}.safetensors`.",
        "",
        "| | |",
        "|---|---|",
        f"| version | `{adapter.version}` |",
        f"| base | `{info.base}`, fingerprint `{info.base_fingerprint}` |",
        f"| blocks | {adapter.depth} of {info.layers} layers, h up to {adapter.h}, d {info.d} |",
        f"| size | {adapter.parameters:,} parameters, {adapter.nbytes / 2**20:.1f} MiB |",
        f"| gate | {_gate(info)} |",
        *_training_rows(info.recipe, info.results),
        "",
        "## Measured",
        "",
        f"Held-out loss in nats per token (lower is better), windows of {report.window} tokens, "
        f"{_attached(name, report)}; *fired* is the share of token-layers on which a block of this adapter acted; "
        "after ±, the standard error of the change, paired over windows.",
        "",
        "| text | base | attached | change | fired | tokens |",
        "|---|---:|---:|---:|---:|---:|",
        *(_source_row(source, measured, name) for source, measured in _own_first(adapter, report.sources)),
        *_tasks(tasks or {}),
        *(line for link in links for line in ("", link)),
    ]
    return "\n".join(lines) + "\n"


def _tasks(tasks: Mapping[str, TaskScores]) -> list[str]:
    if not tasks:
        return []
    about = "Multiple choice, by lm-evaluation-harness: `acc` counts likelihood, `acc_norm` likelihood a character."
    return ["", "## Tasks", "", about, "", *markdown(task_rows(tasks))]


def _gate(info: AdapterInfo) -> str:
    if _always_open(info.recipe):
        return "none: the blocks act on every token"
    return f"{info.gate}, carry {info.carry:g}, threshold {info.threshold:g}"


def _always_open(recipe: Mapping[str, Any]) -> bool:
    """Whether the recipe makes blocks without gates, whatever else it says about gates."""
    return recipe.get("method") == "adapter" or recipe.get("gate", {}).get("kind") == "none"


def _training_rows(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    rows = []
    if "tokens" in results:
        rows.append(f"| trained on | {results['tokens']:,} tokens |")
    if "gate" in recipe and "data" in recipe:
        data = recipe["data"]
        if not _always_open(recipe):
            moved = "trained" if recipe["gate"]["trained"] else "frozen"
            beside = results.get("calibrated", {}).get("beside", {})
            others = "".join(f", beside `{name}` `{version}`" for name, version in beside.items())
            rows.append(f"| gates | {recipe['gate']['init']}, {moved}{others} |")
        rows.append(f"| target text | {_globs(data['target'])} |")
        rows.append(f"| original text | {_globs(data['original'])} |")
        if recipe.get("method") != "adapter":  # this method reads no background text
            rows.append(f"| background text | {_globs(data['background'])} |")
    return rows


def _globs(globs: list[str]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in globs) or "none"


def _attached(name: str, report: Report) -> str:
    others = [f"`{other}`" for other in report.adapters if other != name]
    return f"attached together with {', '.join(others)}" if others else "attached alone"


def _own_first(adapter: Adapter, sources: Mapping[str, SourceReport]) -> list[tuple[str, SourceReport]]:
    roles = assign_roles(sources, {"this": adapter}, {})
    return sorted(sources.items(), key=lambda item: (roles[item[0]].kind != "own", item[0]))


def _source_row(source: str, measured: SourceReport, name: str) -> str:
    return (
        f"| {source} | {measured.before:.3f} | {measured.after:.3f} | {measured.difference} "
        f"| {measured.fired[name]:.2%} | {measured.tokens:,} |"
    )
