"""Plots, written as SVG or PNG by the file's suffix. The same values give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from nr_serve.disk import refused, whole
from nr_serve.errors import BadRequest
from nr_serve.evaluate.pareto import Point, unbeaten

Line = Sequence[tuple[float, float]]
"""(x, y) pairs."""

matplotlib.rcParams["text.parse_math"] = False  # names may hold a $

METADATA: Mapping[str, dict[str, str | None]] = {".svg": {"Date": None}, ".png": {"Software": None}}
"""Metadata that keeps the time and the version out of a file, by file suffix."""


def pareto(path: Path, points: Sequence[Point], *, title: str) -> None:
    """Learned against forgotten: upper left is better; a line joins the points that no other beats in both."""
    figure, axes = _axes(6.4, 4.8, title)
    for point in points:
        axes.plot(point.forgotten, point.learned, "o", color="C0")
        axes.annotate(point.label, (point.forgotten, point.learned), (5, 4), textcoords="offset points", fontsize=8)
    front = unbeaten(points)
    axes.plot([p.forgotten for p in front], [p.learned for p in front], color="0.6", zorder=0)
    axes.margins(0.12)
    axes.axvline(0, color="0.85", zorder=0)
    axes.set_xlabel("forgotten: rise of the loss on the base's text")
    axes.set_ylabel("learned: fall of the loss on the target")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _save(figure, path)


def heat_map(
    path: Path,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    x_label: str = "",
    written: bool = False,
) -> None:
    """A heat map of shares by row and column; None is left blank. With `written`, cells also show percentages.

    Colours follow the square root of the share, so that a leak of 1% is visible beside 80%.
    """
    shares = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    cell, fits = (0.62, 9) if written else (0.24, 2)  # inches per column, and characters that fit in it
    width = max(2.6 + cell * len(columns), 0.09 * len(title))
    figure, axes = _axes(width, 1.5 + 0.22 * len(rows), title)
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="viridis", norm=PowerNorm(0.5, 0, 1))
    axes.set_facecolor("0.9")
    upright = 0 if max(map(len, columns)) <= fits else 90
    axes.set_xticks(range(len(columns)), columns, rotation=upright, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xlabel(x_label)
    if written:
        for (y, x), share in np.ndenumerate(shares):
            if not np.isnan(share):
                ink = "white" if share < 0.3 else "black"
                axes.text(x, y, f"{share:.2%}", ha="center", va="center", fontsize=6, color=ink)
    figure.colorbar(image, ax=axes, format=PercentFormatter(1), ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    _save(figure, path)


def loss_curves(path: Path, curves: Mapping[str, Line], *, title: str) -> None:
    """Loss over tokens trained on, one curve per name."""
    figure, axes = _axes(7.2, 4.2, title)
    for i, (name, curve) in enumerate(curves.items()):
        tokens, losses = [t for t, _ in curve], [loss for _, loss in curve]
        line = "-" if len(curve) > 1 else "o"
        axes.plot(tokens, losses, line, color=f"C{i % 10}", label=name, linewidth=0.7 if len(curve) > 50 else 1.4)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


def panels(
    path: Path, panels: Mapping[str, Mapping[str, Line]], *, title: str, x_label: str, columns: int = 2
) -> None:
    """Shares as lines, one panel per heading; a line's name has the same colour in every panel."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 0.6 + 2.8 * rows), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (heading, lines) in zip(grid, panels.items(), strict=False):
        axes.set_title(heading, fontsize=9)
        for name, line in lines.items():
            x, y = zip(*line, strict=True)
            axes.plot(x, y, ".-", color=f"C{names.index(name) % 10}", markersize=3, linewidth=1)
        axes.set_xlabel(x_label)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(bottom=0)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    keys = [Line2D([], [], color=f"C{i % 10}", label=name) for i, name in enumerate(names)]
    figure.legend(handles=keys, loc="outside right upper", fontsize=8)
    _save(figure, path)


def _axes(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    if path.suffix not in METADATA:
        raise BadRequest(f"cannot write {path}: a plot is a {' or '.join(METADATA)} file")
    # Ids inside an SVG are random unless a salt is set.
    salted = matplotlib.rc_context({"svg.hashsalt": "nr-serve"})
    with refused(f"cannot write {path}"), whole(path) as part, salted:
        figure.savefig(part, format=path.suffix[1:], dpi=120, metadata=METADATA[path.suffix])
