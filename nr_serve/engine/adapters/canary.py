"""The canary: how far an adapter leaks on the probe texts, measured on the base as served. Torch-free.

The texts are read through the adapter alone, in its slot, in pieces that share the steps of running requests: a
piece on trial has a threshold of its own and is not counted. The gates see the stream that earlier residues of the
same adapter moved.
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
    """One version's measurement on the probe texts at one threshold."""

    version: Version
    threshold: float
    begun: bool = False
    """Whether some tokens were read, and nothing became NaN."""
    attachment: int | None = None
    """What is measured, once it acts: another attachment of the version is not meant."""
    leaks: dict[str, Leak] = field(default_factory=dict)
    """On the texts that were read to their end."""
    start: int = 0
    """Tokens read of the next text."""
    fired: int = 0
    """Token-layers of it on which a gate fired."""

    @property
    def acts(self) -> bool:
        """Whether the version acts already; else it waits for what comes of this."""
        return self.attachment is not None


class Probe(NamedTuple):
    """A piece of probe text on its way through a step."""

    measurement: Measurement
    """What it is a part of."""
    piece: Piece


class Canary:
    """Owns the probe texts and what was measured on them. Without texts nothing is measured."""

    def __init__(self, texts: Mapping[str, Request], max_leak: float | None = None) -> None:
        """`texts` by name, outside the scheduler, with a row and pages that nobody else gets.

        `max_leak`: the largest leak that is taken, as a share; None takes any.
        """
        self.max_leak = max_leak
        self._texts = texts
        self._reports: dict[tuple[str, float], Neutrality] = {}  # by content and threshold: a reload is known
        self._last: ref[Measurement] | None = None  # weak: it holds weights, and may be given up at any time

    def report(self, version: Version) -> Neutrality | None:
        """The leak on each probe text; None until it was measured at the version's threshold."""
        return self._reports.get((version.digest, version.threshold))

    def must_measure(self, version: Version, threshold: float) -> bool:
        """Whether the leak at this threshold is not known yet."""
        return bool(self._texts) and (version.digest, threshold) not in self._reports

    def begin(self, version: Version, threshold: float) -> Measurement | None:
        """A measurement of the version at this threshold; None if there is none to make."""
        return Measurement(version, threshold) if self.must_measure(version, threshold) else None

    def done(self, measurement: Measurement) -> bool:
        """Whether all texts were read."""
        return len(measurement.leaks) == len(self._texts)

    def may_act(self, measurement: Measurement) -> bool:
        """Whether what is measured may act: below a limit, or, without one, if it begins without NaN."""
        return measurement.begun if self.max_leak is None else self.done(measurement)

    def probe(self, measurement: Measurement, most: int) -> Probe:
        """The measurement's next piece, of at most so many tokens."""
        if self._last is None or self._last() is not measurement:
            # Its row and pages were another's meanwhile: the text begins again.
            self._last, measurement.start, measurement.fired = ref(measurement), 0, 0
        request = self._texts[self._text(measurement)]
        request.selection = (measurement.version,)
        count = min(most, request.prompt_length - measurement.start)
        return Probe(measurement, Piece(request, measurement.start, count, trial=measurement.threshold))

    def add(self, probe: Probe, result: Result) -> None:
        """Take what running the probe gave.

        Raises the result's error, and BadRequest if the adapter leaks more than is allowed; then nothing is noted.
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
