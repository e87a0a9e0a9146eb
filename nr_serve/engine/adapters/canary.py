"""The canary: how far an adapter leaks on the probe texts, measured on the base as served. Torch-free.

Each text is read with only that adapter selected, in its slot, in pieces that share the steps of running requests.
A piece on trial has its own threshold, and its gates are not counted in the statistics. The gates see the stream
with the same adapter's earlier residues in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import ref

from nr_serve.engine.adapters.registry import Version
from nr_serve.engine.messages import Leak, Neutrality
from nr_serve.engine.request import Request
from nr_serve.engine.scheduler import Piece, Result
from nr_serve.errors import BadRequest

MOST_REPORTS = 1024


@dataclass(eq=False)
class Measurement:
    """Measurement of one version's leak on the probe texts, at one threshold."""

    version: Version
    threshold: float
    begun: bool = False
    """Whether some tokens were read without NaN."""
    attachment: int | None = None
    """The measured attachment, if it acts already; None while the version waits to act."""
    leaks: dict[str, Leak] = field(default_factory=dict)
    """Leak on each text that was read to its end."""
    start: int = 0
    """Number of tokens read of the current text."""
    fired: int = 0
    """Token-layers of the current text on which a gate fired."""

    @property
    def acts(self) -> bool:
        """Whether the version acts already; if not, it waits for the result."""
        return self.attachment is not None


class Probe(NamedTuple):
    """A piece of a probe text to run in a step."""

    measurement: Measurement
    """The measurement that the piece belongs to."""
    piece: Piece


class Canary:
    """Owns the probe texts and the leaks measured on them. Without texts nothing is measured."""

    def __init__(self, texts: Mapping[str, Request], max_leak: float | None = None) -> None:
        """`texts`: requests by name, outside the scheduler, with a row and pages that only they use.

        `max_leak`: the largest share of token-layers that may fire; None: no limit.
        """
        self.max_leak = max_leak
        self._texts = texts
        self._reports: dict[tuple[str, float], Neutrality] = {}  # keyed by content and threshold: a reload is known
        self._last: ref[Measurement] | None = None  # weak: a measurement holds weights and may be dropped any time

    def report(self, version: Version) -> Neutrality | None:
        """Leak on each probe text; None until measured at the version's threshold."""
        return self._reports.get((version.digest, version.threshold))

    def must_measure(self, version: Version, threshold: float) -> bool:
        """Whether the leak at this threshold is not known yet."""
        return bool(self._texts) and (version.digest, threshold) not in self._reports

    def begin(self, version: Version, threshold: float) -> Measurement | None:
        """A new measurement of the version at this threshold; None if the leak is known."""
        return Measurement(version, threshold) if self.must_measure(version, threshold) else None

    def done(self, measurement: Measurement) -> bool:
        """Whether all texts were read."""
        return len(measurement.leaks) == len(self._texts)

    def may_act(self, measurement: Measurement) -> bool:
        """Whether the version may act: with a limit, once all texts are read; else after a piece without NaN."""
        return measurement.begun if self.max_leak is None else self.done(measurement)

    def probe(self, measurement: Measurement, most: int) -> Probe:
        """The measurement's next piece, of at most `most` tokens."""
        if self._last is None or self._last() is not measurement:
            # Another measurement used the row and pages meanwhile: the text starts again.
            self._last, measurement.start, measurement.fired = ref(measurement), 0, 0
        request = self._texts[self._text(measurement)]
        request.selection = (measurement.version,)
        count = min(most, request.prompt_length - measurement.start)
        return Probe(measurement, Piece(request, measurement.start, count, trial=measurement.threshold))

    def add(self, probe: Probe, result: Result) -> None:
        """Take the result of a probe.

        Raises the result's error, or BadRequest if the adapter leaks more than allowed; then no report is kept.
        """
        if result.error is not None:
            raise result.error
        measurement, piece = probe
        version, tokens = measurement.version, piece.request.prompt_length
        assert version.slot is not None
        measurement.begun = True
        measurement.start += piece.count
        measurement.fired += sum(fired_S[version.slot] for fired_S in result.fired)
        if measurement.start < tokens:
            return
        seen = tokens * version.payload.depth
        measurement.leaks[self._text(measurement)] = Leak(measurement.fired, seen, tokens)
        measurement.start = measurement.fired = 0
        if self.done(measurement):
            self._check(measurement)
            self._keep(measurement)

    def _text(self, measurement: Measurement) -> str:
        return next(name for name in self._texts if name not in measurement.leaks)

    def _check(self, measurement: Measurement) -> None:
        name, worst = max(measurement.leaks.items(), key=lambda item: item[1].rate)
        if self.max_leak is not None and worst.rate > self.max_leak:
            raise BadRequest(
                f"adapter {measurement.version.name!r} leaks: on the probe text {name!r} its gates fired on "
                f"{worst.rate:.3%} of the token-layers, and --max-leak is {self.max_leak:.3%}; a higher threshold "
                "leaks less",
                param="threshold",
            )

    def _keep(self, measurement: Measurement) -> None:
        self._reports[measurement.version.digest, measurement.threshold] = measurement.leaks
        if len(self._reports) > MOST_REPORTS:
            del self._reports[next(iter(self._reports))]
