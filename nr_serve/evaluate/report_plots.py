"""The plots of a report: where each adapter's gates open, and the interference matrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nr_serve.evaluate.heldout import Report
from nr_serve.evaluate.interference import Interference
from nr_serve.evaluate.plots import heat_map, panels
from nr_serve.evaluate.roles import Role
from nr_serve.evaluate.switches import SwitchReport
from nr_serve.train.entries import language_of


def plot_gates(
    folder: Path, report: Report, roles: Mapping[str, Role], adapter: str, suffix: str
) -> dict[str, Path]:
    """Write an adapter's gate rate by layer and language; returns the caption and the file."""
    rates = gate_rates(report, roles, adapter)
    layers = [str(i) for i in range(len(next(iter(rates.values()))))]
    caption = f"Gate rate of {adapter} by layer: share of tokens on which it fired"
    path = folder / f"gates-{adapter}{suffix}"
    heat_map(path, list(rates), layers, list(rates.values()), title=caption, x_label="layer")
    return {caption: path}


def plot_matrix(folder: Path, measured: Interference, suffix: str) -> dict[str, Path]:
    """Write the interference matrix; returns the caption and the file."""
    sources, names, shares = measured.matrix()
    caption = "Who fires on what: share of token-layers, all attached"
    path = folder / f"interference{suffix}"
    heat_map(path, sources, names, shares, title=caption, written=True)
    return {caption: path}


def plot_switches(folder: Path, report: SwitchReport, suffix: str) -> dict[str, Path]:
    """Write the gate rate at language switches, a line per adapter; returns the caption and the file."""
    span = report.stretch
    around = {
        heading: {
            name: [(i - span, rate) for i, rate in enumerate(switch.rates[start : start + 2 * span])]
            for name, switch in report.adapters.items()
        }
        for heading, start in (("into the adapter's text", 0), ("out of it", span))
    }
    caption = "Gate rate at language switches: share of layers that fired"
    path = folder / f"switches{suffix}"
    panels(path, around, title=caption, x_label="tokens from the switch")
    return {caption: path}


def gate_rates(report: Report, roles: Mapping[str, Role], adapter: str) -> dict[str, list[float | None]]:
    """Share of tokens on which the adapter fired, by language and layer; languages it learned come first.

    Text that the adapter learned has its own row, such as `en (own)` for an adapter to a domain of English.
    """
    groups: dict[tuple[bool, str], list[str]] = {}
    for source in report.sources:
        groups.setdefault((adapter not in roles[source].own, language_of(source)), []).append(source)
    return {
        language if foreign else f"{language} (own)": _rate(report, sources, adapter)
        for (foreign, language), sources in sorted(groups.items())
    }


def _rate(report: Report, sources: list[str], adapter: str) -> list[float | None]:
    """Mean over the sources, weighted by their tokens, for each layer; None where the adapter has no block."""
    tokens = sum(report.sources[source].tokens for source in sources)
    layers = zip(*(report.sources[source].fired_by_layer[adapter] for source in sources), strict=True)
    weights = [report.sources[source].tokens / tokens for source in sources]
    return [
        None if None in shares else sum(w * s for w, s in zip(weights, shares, strict=True) if s is not None)
        for shares in layers
    ]
