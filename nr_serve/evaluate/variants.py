"""Variants of one adapter beside each other, each attached alone: what a carry or a threshold costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from nr_serve.evaluate.heldout import Report, SourceReport
from nr_serve.evaluate.roles import Role, assign_roles
from nr_serve.evaluate.tables import Rows
from nr_serve.neutral.format import Adapter

KINDS = ("OWN TEXT", "BASE'S LANGUAGE", "OTHER TEXT")


def variant_rows(reports: Mapping[str, Report], adapters: Mapping[str, Adapter]) -> Rows:
    """One row per adapter, attached alone: change of the loss and share fired, means over each kind's sources."""
    measured = [f"{kind}: {what}" for kind in KINDS for what in ("CHANGE", "FIRED")]
    rows = [_row(name, report, adapters[name]) for name, report in reports.items()]
    return [["ADAPTER", "CARRY", "THRESHOLD", *measured], *rows]


def _row(name: str, report: Report, adapter: Adapter) -> list[str]:
    roles = assign_roles(report.sources, {name: adapter}, {})
    of_kind: dict[str, list[SourceReport]] = {kind: [] for kind in KINDS}
    for source, role in roles.items():
        of_kind[_kind(role)].append(report.sources[source])
    means = [mean for sources in of_kind.values() for mean in _means(name, sources)]
    return [name, f"{adapter.info.carry:g}", f"{adapter.info.threshold:g}", *means]


def _kind(role: Role) -> str:
    return {"own": KINDS[0], "original": KINDS[1]}.get(role.kind, KINDS[2])


def _means(name: str, sources: Sequence[SourceReport]) -> list[str]:
    if not sources:
        return ["-", "-"]
    change = fmean(source.difference.share for source in sources)
    fired = fmean(source.fired[name] for source in sources)
    return [f"{change:+.2%}", f"{fired:.2%}"]
