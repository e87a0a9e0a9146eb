"""Held-out loss and fired shares of attached adapters, by source of text.

Measured through the same hosted blocks that are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nr_serve.evaluate.difference import Difference, difference
from nr_serve.evaluate.hosted import Hosted
from nr_serve.evaluate.readings import in_turn, measure_hosted
from nr_serve.train.measure import SourceResult
from nr_serve.train.text.pack import Windows


@dataclass(frozen=True)
class SourceReport:
    """Measurements of one source of text, without and with the adapters attached."""

    before: float
    """Loss of the base alone, nats per token."""
    after: float
    """Loss with the adapters attached, nats per token."""
    difference: Difference
    """Change from `before` to `after`."""
    tokens: int
    """Number of tokens read."""
    fired: Mapping[str, float]
    """Share of token-layers that fired, by adapter name."""
    fired_by_layer: Mapping[str, Sequence[float | None]]
    """Share of tokens that fired in each layer, by adapter name; None for a layer without a block."""


@dataclass(frozen=True)
class Report:
    """How attaching some adapters changes each source of text."""

    base: str
    base_fingerprint: str
    adapters: Mapping[str, str]
    """Version of each adapter, by name."""
    window: int
    """Tokens per window."""
    sources: Mapping[str, SourceReport]

    def document(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self)


def each_alone(hosted: Hosted, texts: Mapping[str, Windows]) -> dict[str, Report]:
    """A report for each adapter, by name, with no other adapter attached."""
    return {name: _attach(hosted, texts, (name,)) for name in hosted.names}


def attach_all(hosted: Hosted, texts: Mapping[str, Windows]) -> Report:
    """Loss and fired shares of `texts`, by source, with no adapter and with all adapters attached."""
    return _attach(hosted, texts, hosted.names)


def _attach(hosted: Hosted, texts: Mapping[str, Windows], names: Sequence[str]) -> Report:
    before: dict[str, SourceResult] = {}
    after: dict[str, SourceResult] = {}
    for source, windows, place in in_turn(texts):
        before[source] = measure_hosted(hosted, (), windows, place)
        after[source] = measure_hosted(hosted, names, windows, place)
    return report(hosted, names, texts, before, after)


def report(
    hosted: Hosted,
    names: Sequence[str],
    texts: Mapping[str, Windows],
    before: Mapping[str, SourceResult],
    after: Mapping[str, SourceResult],
) -> Report:
    """The report of `texts`, measured with no adapter and with the adapters `names` attached."""
    sources = {
        source: SourceReport(
            before=before[source].loss,
            after=after[source].loss,
            difference=difference(before[source], after[source]),
            tokens=after[source].tokens,
            fired=dict(zip(names, after[source].fired, strict=True)),
            fired_by_layer=dict(zip(names, after[source].fired_by_layer, strict=True)),
        )
        for source in texts
    }
    return Report(
        base=hosted.base.name,
        base_fingerprint=hosted.base.fingerprint,
        adapters={name: hosted.versions[name] for name in names},
        window=next(iter(texts.values())).ids_NT.shape[1],
        sources=sources,
    )
