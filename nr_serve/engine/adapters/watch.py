"""The watch: what acts before its leak is known, and what is put back should it diverge. Torch-free.

Without a limit an adapter acts as soon as it began well, and the rest of it is measured in the background.
"""

from __future__ import annotations

from collections import deque

from nr_serve.engine.adapters.canary import Canary, Measurement
from nr_serve.engine.adapters.registry import Version
from nr_serve.engine.cache.neutrality import Attachments


class Watch:
    """Owns the queue of what is measured in the background, and what acted before each version not measured yet."""

    def __init__(self, canary: Canary, attachments: Attachments) -> None:
        self._canary = canary
        self._attachments = attachments
        self._queue: deque[Measurement] = deque()
        self._before: dict[Version, Version] = {}

    def __bool__(self) -> bool:
        """Whether something is to be measured."""
        return bool(self._queue)

    # What acts

    def opened(self, version: Version, attachment: int, measurement: Measurement | None) -> None:
        """The version acts from the next step on, so attached; `measurement`: what was made of it before that."""
        if measurement is None or measurement.threshold != version.threshold:
            measurement = self._canary.begin(version, version.threshold)
        if measurement is not None and not self._canary.done(measurement):
            measurement.attachment = attachment
            self._queue.append(measurement)

    def replaces(self, version: Version, before: Version) -> None:
        """`version` takes its name from `before`: the last that was measured comes back, if it must."""
        older = self._before.pop(before, before)
        if self._canary.must_measure(version, version.threshold):
            known = not self._canary.must_measure(before, before.threshold)  # under another name, meanwhile
            self._before[version] = before if known else older

    def turns(self, version: Version, threshold: float) -> None:
        """The version leaves its threshold for another: it comes back, if it was measured."""
        if not self._canary.must_measure(version, threshold):
            self._before.pop(version, None)
        elif not self._canary.must_measure(version, version.threshold):
            self._before[version] = version.again()

    def pins(self, version: Version, pinned: bool) -> None:
        """The name was pinned, or set free, whoever bears it."""
        if version in self._before:
            self._before[version].pinned = pinned

    def unloaded(self, version: Version) -> None:
        """The name is gone: nobody comes back."""
        self._before.pop(version, None)

    # Measuring

    def next(self) -> Measurement | None:
        """What is to be measured next."""
        while self._queue and not self.wants(self._queue[0]):
            self._queue.popleft()
        return self._queue[0] if self._queue else None

    def wants(self, measurement: Measurement) -> bool:
        """Whether what is measured still acts, for new requests, at this threshold."""
        return measurement.attachment in self._attachments.all and not measurement.version.retired

    def measuring(self, version: Version) -> bool:
        """Whether the version, as it acts now, is still to be measured."""
        return any(each.version is version and self.wants(each) for each in self._queue)

    def done(self, measurement: Measurement) -> None:
        """All texts were read: it stays."""
        self._queue.remove(measurement)
        self._before.pop(measurement.version, None)

    def failed(self, measurement: Measurement) -> None:
        """It could not be measured. That alone is no reason to put anything back."""
        self._queue.remove(measurement)

    def put_back(self, version: Version) -> Version | None:
        """The version diverges: what is to act in its place, not in a slot yet."""
        before = self._before.pop(version, None)
        return None if before is None else before.again()
