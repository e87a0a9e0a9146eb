"""Changes under way: versions get slots or other thresholds, a little at a time between steps. Torch-free."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from nr_serve.engine.adapters.canary import Canary, Measurement
from nr_serve.engine.adapters.registry import Registry, Selection, Version
from nr_serve.engine.adapters.watch import Watch
from nr_serve.engine.messages import AdapterView, LoadAdapter, PatchAdapter
from nr_serve.errors import BadAdapterFile, Conflict, NrError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """A load command, with where to send its answer."""

    message: LoadAdapter
    answer: Future[AdapterView]
    """Gets the version's view once it is published, or the error."""
    started: float
    """When the load began, in seconds by `time.perf_counter`."""


class Change(ABC):
    """A change of one version: its weights are copied, then it is measured if it must be, then it acts."""

    def __init__(
        self,
        changes: Changes,
        version: Version,
        copying: Iterator[None],
        measurement: Measurement | None,
        answer: Future[AdapterView] | None = None,
    ) -> None:
        """`answer` gets the version's view once it acts, or the error; None if nobody waits for it."""
        self.version, self.copying, self.measurement = version, copying, measurement
        self.answer: Future[AdapterView] = answer or Future()
        self.copied = False
        self._changes = changes

    @abstractmethod
    def act(self) -> None:
        """Let the version act from the next step on."""

    @abstractmethod
    def refuse(self, error: NrError) -> None:
        """Leave everything as it was: the version must not act."""

    def abandon(self, error: NrError) -> None:
        """End with `error`, because the engine is ending; does nothing if the change has been answered."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Attach(Change):
    """Copies a registered version into a slot. Nobody waits for an answer."""

    def __init__(self, changes: Changes, version: Version, slot: int) -> None:
        super().__init__(changes, version, *changes.place(version, slot))

    def act(self) -> None:
        """Let the version act; its slot is freed at once if it was retired meanwhile."""
        self._changes.open(self.version, self.measurement)
        self._changes.registry.attach(self.version)
        self._changes.fill()

    def refuse(self, error: NrError) -> None:
        """Drop the version only if it diverges: it was registered before it could be measured, so it is served."""
        if isinstance(error, BadAdapterFile):
            self._changes.registry.displace(self.version)
            if not self.version.retired:
                self._changes.reject_served(self.version, error)
            self._changes.fill()
            return
        log.error("adapter %s, version %s: %s", self.version.name, self.version.digest, error.message)
        if self.measurement is not None and not self._changes.canary.done(self.measurement):
            self.measurement = None  # measure again from the start: the failed piece's carry is lost
        self.act()


class Load(Change):
    """Copies a new version into a slot, then gives it its name."""

    def __init__(self, changes: Changes, version: Version, slot: int, order: Order) -> None:
        self._evicted = changes.registry.in_slot(slot)
        super().__init__(changes, version, *changes.place(version, slot), order.answer)
        self._order = order

    def act(self) -> None:
        """Publish the version, unless its name was taken meanwhile."""
        try:
            self._changes.registry.check_name(self.version.name, replace=self._order.message.replace)
        except NrError as error:
            self.refuse(error)
            return
        self._changes.open(self.version, self.measurement)
        self._changes.publish(self.version, self._order)

    def refuse(self, error: NrError) -> None:
        """Free the slot, and give it back to the version that was in it before."""
        self._changes.registry.displace(self.version)
        before = self._evicted
        if before is not None and before.slot is None and not before.retired:
            self._changes.attach(before)
        self._changes.fill()
        self.answer.set_exception(error)


class Patch(Change):
    """Changes a version's threshold after measuring at the new one; the version stays in its slot meanwhile."""

    def __init__(
        self,
        changes: Changes,
        version: Version,
        message: PatchAdapter,
        threshold: float,
        answer: Future[AdapterView],
    ) -> None:
        super().__init__(changes, version, iter(()), changes.canary.begin(version, threshold), answer)
        self._message = message
        changes.registry.keep(version)

    def act(self) -> None:
        """Apply the new settings, unless the version was retired meanwhile."""
        self._let_go()
        if self.version.retired:
            name = self.version.name
            self.answer.set_exception(Conflict(f"adapter {name!r} was replaced or unloaded meanwhile"))
            return
        self._changes.turn(self.version, self._message)
        self.answer.set_result(self._changes.view(self.version))

    def refuse(self, error: NrError) -> None:
        """Leave the settings as they are."""
        self._let_go()
        self.answer.set_exception(error)

    def _let_go(self) -> None:
        self._changes.registry.let_go(self.version)
        self._changes.fill()


class Changes:
    """Owns the changes under way, handled in order of arrival, and applies their outcome."""

    def __init__(
        self,
        registry: Registry,
        canary: Canary,
        watch: Watch,
        view: Callable[[Version], AdapterView],
        reject_served: Callable[[Version, NrError], None],
    ) -> None:
        """`view` makes a version's view; `reject_served` is called with a served version that failed."""
        self.registry, self.canary, self.view, self.reject_served = registry, canary, view, reject_served
        self._watch = watch
        self._queue: deque[Change] = deque()

    def __bool__(self) -> bool:
        """Whether any change is under way."""
        return bool(self._queue)

    # Starting changes

    def attach(self, version: Version, beside: Selection = ()) -> bool:
        """Start to attach a registered version; False if all slots are in use or hold versions of `beside`."""
        slot = self.registry.find_slot(beside)
        if slot is not None:
            self._queue.append(Attach(self, version, slot))
        return slot is not None

    def load(self, version: Version, order: Order) -> bool:
        """Start to attach a new version; False if every slot is in use."""
        slot = self.registry.find_slot()
        if slot is not None:
            self._queue.append(Load(self, version, slot, order))
        return slot is not None

    def patch(self, version: Version, message: PatchAdapter, threshold: float, answer: Future[AdapterView]) -> bool:
        """Start to measure a threshold, in a slot; False if the version has no slot and every slot is in use."""
        if version.slot is None and not self.attach(version):
            return False
        self._queue.append(Patch(self, version, message, threshold, answer))
        return True

    def patches(self, version: Version) -> bool:
        """Whether a change of the version's threshold is under way."""
        return any(isinstance(change, Patch) and change.version is version for change in self._queue)

    def fill(self) -> None:
        """Attach registered versions that found no slot before, newest first, while slots are free."""
        while self.registry.slots_used < self.registry.slots:
            waiting = [version for version in self.registry if version.slot is None]
            if not waiting:
                return
            self.attach(max(waiting, key=lambda version: version.loaded_at))

    # Changes under way

    def copy_some(self, seconds: float) -> None:
        """Copy weights for about `seconds`, at least a part of a layer; then let what is ready act."""
        end = time.perf_counter() + seconds
        while self._queue:
            change = self._queue[0]
            for _ in change.copying:
                if time.perf_counter() >= end:
                    return
            change.copied = True
            if not self._may_act(change):
                return
            self._end(lambda change: change.act())

    def to_measure(self) -> Measurement | None:
        """The measurement that the first change waits for, if it is copied. There must be a change."""
        change = self._queue[0]
        return change.measurement if change.copied and not self._may_act(change) else None

    def refuse(self, error: NrError) -> None:
        """Refuse the first change: the canary measured too much leak, or an error."""
        self._end(lambda change: change.refuse(error))

    def abandon(self, error: NrError) -> None:
        """Fail every change with `error`: the engine is ending."""
        for change in self._queue:
            change.abandon(error)
        self._queue.clear()

    def _end(self, how: Callable[[Change], None]) -> None:
        """Take the first change off the queue and end it. If that fails, put it back, to be abandoned later."""
        change = self._queue.popleft()
        try:
            how(change)
        except Exception:
            self._queue.appendleft(change)
            raise

    def _may_act(self, change: Change) -> bool:
        return change.measurement is None or self.canary.may_act(change.measurement)

    # Effects of changes

    def place(self, version: Version, slot: int) -> tuple[Iterator[None], Measurement | None]:
        """Give the version a slot. Returns an iterator that copies the weights, and the measurement to make."""
        return self.registry.place(version, slot), self.canary.begin(version, version.threshold)

    def open(self, version: Version, measurement: Measurement | None = None) -> None:
        """Let the version in its slot act from the next step on; its leak is then measured, if not yet known."""
        self._watch.opened(version, self.registry.open(version), measurement)

    def turn(self, version: Version, patch: PatchAdapter) -> None:
        """Apply new settings; a new threshold acts from the next step on.

        All but the threshold are also those of what may be put back in its place.
        """
        for each in filter(None, (version, self._watch.before(version))):
            each.pinned = each.pinned if patch.pinned is None else patch.pinned
            each.routed = each.routed if patch.routed is None else patch.routed
        if patch.threshold is not None and patch.threshold != version.threshold:
            self._watch.turns(version, patch.threshold)
            version.threshold = patch.threshold
            if version.attached:
                self.open(version)

    def publish(self, version: Version, order: Order) -> None:
        """Give the version its name and, unless the order says otherwise, the settings of the version before it."""
        before = self.registry.get(version.name) if version.name in self.registry else None
        like = before or version  # read now: they may have changed while this version was copied
        version.pinned = like.pinned if order.message.pinned is None else order.message.pinned
        version.routed = like.routed if order.message.routed is None else order.message.routed
        if version.slot is not None:
            self.registry.attach(version)
        if before is not None:
            self._watch.replaces(version, before)
        self.take_name(version)
        version.load_seconds = time.perf_counter() - order.started
        order.answer.set_result(self.view(version))

    def take_name(self, version: Version) -> None:
        """Make the version the one that its name means from now on."""
        self.registry.publish(version)
        self.fill()
