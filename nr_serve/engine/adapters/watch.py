"""The watch: adapters that act before their leak is known, and what is put back if one diverges. Torch-free.

Without a leak limit, an adapter acts once its first probe piece ran without NaN; the rest is measured later.
"""

from __future__ import annotations

from collections import deque

from nr_serve.engine.adapters.canary import Canary, Measurement
from nr_serve.engine.adapters.registry import Version
from nr_serve.engine.cache.neutrality import Attachments


class Watch:
    """Owns the queue of background measurements, and for each unmeasured version the one that acted before it."""

    def __init__(self, canary: Canary, attachments: Attachments) -> None:
        self._canary = canary
        self._attachments = attachments
        self._queue: deque[Measurement] = deque()
        self._before: dict[Version, Version] = {}

    def __bool__(self) -> bool:
        """Whether anything is queued to be measured."""
        return bool(self._queue)

    # What acts

    def opened(self, version: Version, attachment: int, measurement: Measurement | None) -> None:
        """Note that the version acts from the next step on. `measurement`: what was measured of it before."""
        if measurement is None or measurement.threshold != version.threshold:
            measurement = self._canary.begin(version, version.threshold)
        if measurement is not None and not self._canary.done(measurement):
            measurement.attachment = attachment
            self._queue.append(measurement)

    def replaces(self, version: Version, before: Version) -> None:
        """`version` takes the name of `before`. If `version` diverges, the last measured version is put back."""
        older = self._before.pop(before, before)
        if self._canary.must_measure(version, version.threshold):
            known = not self._canary.must_measure(before, before.threshold)  # maybe since, under another name
            self._before[version] = before if known else older

    def turns(self, version: Version, threshold: float) -> None:
        """The version's threshold changes. If the new one diverges, the old one is put back, if it was measured."""
        if not self._canary.must_measure(version, threshold):
            self._before.pop(version, None)
        elif not self._canary.must_measure(version, version.threshold):
            self._before[version] = version.again()

    def before(self, version: Version) -> Version | None:
        """The version that is put back if this one diverges."""
        return self._before.get(version)

    def unloaded(self, version: Version) -> None:
        """Note that the name was unloaded: nothing is put back."""
        self._before.pop(version, None)

    # Measuring

    def next(self) -> Measurement | None:
        """The next measurement to make; None if there is none."""
        while self._queue and not self.wants(self._queue[0]):
            self._queue.popleft()
        return self._queue[0] if self._queue else None

    def wants(self, measurement: Measurement) -> bool:
        """Whether the measured attachment still acts and its version can still be selected."""
        return measurement.attachment in self._attachments.all and not measurement.version.retired

    def measuring(self, version: Version) -> bool:
        """Whether the version, at its current threshold, is still to be measured."""
        return any(each.version is version and self.wants(each) for each in self._queue)

    def done(self, measurement: Measurement) -> None:
        """All texts were read without divergence: the version stays."""
        self._queue.remove(measurement)
        self._before.pop(measurement.version, None)

    def failed(self, measurement: Measurement) -> None:
        """Drop a measurement that failed. That alone is no reason to put anything back."""
        self._queue.remove(measurement)

    def put_back(self, version: Version) -> Version | None:
        """The version diverged: returns a copy, in no slot, of the version to act in its place (None: none)."""
        before = self._before.pop(version, None)
        return None if before is None else before.again()
