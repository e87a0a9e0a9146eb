"""Interference: what adapters attached together do to each other's text, to the base's, and to everyone else's.

Each source of text is read with no adapter attached, with the adapters that learned it, and with all attached.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nr_serve.evaluate.difference import Difference, difference
from nr_serve.evaluate.heldout import Report, report
from nr_serve.evaluate.hosted import Hosted
from nr_serve.evaluate.readings import in_turn, measure_hosted
from nr_serve.evaluate.roles import Kind, Role, assign_roles
from nr_serve.train.measure import SourceResult
from nr_serve.train.text.pack import Windows


@dataclass(frozen=True)
class Alone:
    """A source measured with only the adapters that learned it attached."""

    loss: float
    """Mean loss, nats per token."""
    difference: Difference
    """Change of the loss when all adapters are attached."""


@dataclass(frozen=True)
class Worst:
    """The worst value among some sources and adapters, and where it was found."""

    value: float
    """Relative change of the loss, or share of token-layers that fired."""
    source: str
    adapter: str | None = None
    """The adapter that fired; None for a change of the loss."""
    standard_error: float | None = None
    """Standard error of the value, for a change of the loss."""


@dataclass(frozen=True)
class Summary:
    """The worst value of each kind; None where nothing is of that kind.

    Each change compares the loss with all adapters attached to the loss it is measured against.
    """

    own_against_alone: Worst | None
    """Worst change on text that an adapter learned, against that adapter attached alone."""
    original_against_base: Worst | None
    """Worst change on the base's own language, where no adapter learned the text, against the base."""
    seen_against_base: Worst | None
    """Worst change on other languages that are in some adapter's recipe, against the base."""
    unseen_against_base: Worst | None
    """Worst change on languages in no adapter's recipe, against the base."""
    near_against_base: Worst | None
    """Worst change on close relatives of a learned language, against the base."""
    original_fired: Worst | None
    """Highest share fired by an adapter on text of the base's language that it did not learn."""
    foreign_fired: Worst | None
    """Highest share fired by an adapter on another language that it did not learn, close relatives left out."""
    near_fired: Worst | None
    """Highest share fired by an adapter on a close relative of a language that it learned."""


@dataclass(frozen=True)
class Interference:
    """Every source, read with no adapter, with those that learned it, and with all."""

    report: Report
    """No adapter attached, compared to all attached."""
    roles: Mapping[str, Role]
    alone: Mapping[str, Alone]
    """Results of each source that some adapter learned, with only those adapters attached."""

    def summary(self) -> Summary:
        """The worst value of each kind."""
        sources = self.report.sources
        alone = [
            Worst(a.difference.share, source, standard_error=a.difference.standard_error)
            for source, a in self.alone.items()
        ]
        fired = [
            (role, Worst(share, source, adapter))
            for source, role in self.roles.items()
            for adapter, share in sources[source].fired.items()
            if adapter not in role.own
        ]
        near = [worst for role, worst in fired if worst.adapter in role.near]
        others = [worst for _, worst in fired if worst not in near]
        return Summary(
            own_against_alone=_worst(alone),
            original_against_base=self._against_base("original"),
            seen_against_base=self._against_base("seen"),
            unseen_against_base=self._against_base("unseen"),
            near_against_base=self._against_base("near"),
            original_fired=_worst(worst for worst in others if self.roles[worst.source].original),
            foreign_fired=_worst(worst for worst in others if not self.roles[worst.source].original),
            near_fired=_worst(near),
        )

    def _against_base(self, kind: Kind) -> Worst | None:
        changes = [(s, self.report.sources[s].difference) for s, role in self.roles.items() if role.kind == kind]
        return _worst(Worst(d.share, source, standard_error=d.standard_error) for source, d in changes)

    def matrix(self) -> tuple[list[str], list[str], list[list[float]]]:
        """The interference matrix: sources, adapters, and the share each adapter fired on each source."""
        names = list(self.report.adapters)
        sources = self.ordered()
        return sources, names, [[self.report.sources[s].fired[name] for name in names] for s in sources]

    def ordered(self) -> list[str]:
        """The sources: each adapter's own, then close relatives, the base's language, others seen, unseen."""
        kinds = ("own", "near", "original", "seen", "unseen")
        place = {name: i for i, name in enumerate(self.report.adapters)}
        return sorted(
            self.roles,
            key=lambda s: (kinds.index(self.roles[s].kind), [place[name] for name in self.roles[s].own], s),
        )

    def document(self) -> dict[str, Any]:
        """The results as plain values, for JSON."""
        document = self.report.document()
        for source, row in document["sources"].items():
            row |= {"role": asdict(self.roles[source])}
            row |= {"alone": asdict(self.alone[source]) if source in self.alone else None}
        return document | {"summary": asdict(self.summary())}


def interference(
    hosted: Hosted, texts: Mapping[str, Windows], near: Mapping[str, Sequence[str]] | None = None
) -> Interference:
    """Measure `texts` with no adapter, with the adapters that learned each text, and with all adapters attached.

    `near` names, for a language, its close relatives. Raises BadRequest for an entry that does not apply.
    """
    roles = assign_roles(texts, hosted.adapters, near or {})
    before: dict[str, SourceResult] = {}
    together: dict[str, SourceResult] = {}
    alone: dict[str, Alone] = {}
    for source, windows, place in in_turn(texts):
        before[source] = measure_hosted(hosted, (), windows, place)
        together[source] = measure_hosted(hosted, hosted.names, windows, place)
        own = roles[source].own
        if own:
            silent = _others_silent(hosted, own, together[source])
            read = together[source] if silent else measure_hosted(hosted, own, windows, place)
            alone[source] = Alone(read.loss, difference(read, together[source]))
    return Interference(report(hosted, hosted.names, texts, before, together), roles, alone)


def _others_silent(hosted: Hosted, own: Collection[str], together: SourceResult) -> bool:
    """Whether no adapter outside `own` fired; then those of `own` alone would give exactly the same loss."""
    return not any(fired for name, fired in zip(hosted.names, together.fired, strict=True) if name not in own)


def _worst(rows: Iterable[Worst]) -> Worst | None:
    return max(rows, key=lambda row: (math.isnan(row.value), row.value), default=None)
