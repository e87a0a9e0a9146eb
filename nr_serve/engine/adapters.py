"""The adapters as the engine has them: names and versions (registry) and their weights (bank). Torch-free.

Everything here runs on the engine's thread, between steps.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nr_serve.engine.canary import Canary, Measurement, Probe
from nr_serve.engine.gate_counts import GateCounts
from nr_serve.engine.messages import AdapterGates, AdapterView, LoadAdapter, PatchAdapter
from nr_serve.engine.neutrality import Attachments
from nr_serve.engine.request import Request
from nr_serve.engine.scheduler import Result
from nr_serve.engine.watch import Watch
from nr_serve.errors import BadAdapterFile, BadRequest, Conflict, NrError, Unavailable
from nr_serve.names import OTHER
from nr_serve.neutral import MAX_THRESHOLD
from nr_serve.neutral.registry import Registry, Selection, Version

if TYPE_CHECKING:
    from nr_serve.neutral.bank import Bank
    from nr_serve.neutral.format import Adapter

log = logging.getLogger(__name__)
COPY_SECONDS = 0.001  # of copying weights between two steps: small beside a step, so that no stream feels it


@dataclass(eq=False, slots=True)
class _Change:
    """A version on its way into its slot or, with a `patch`, to another threshold there."""

    version: Version
    copying: Iterator[None]
    """Done first, between steps."""
    measurement: Measurement | None
    """To be made, in part or whole, before it acts."""
    started: float
    answer: Future[AdapterView] | None = None
    """Set for a load and for a patch: it is answered when it acts. A load is published then."""
    load: LoadAdapter | None = None
    copied: bool = False
    patch: PatchAdapter | None = None
    evicted: Version | None = None
    """Who had the slot before."""


class Adapters:
    """Loads, replaces, unloads and attaches adapters while steps run."""

    def __init__(self, bank: Bank, canary: Canary | None = None) -> None:
        """Without a `canary` nothing is measured."""
        self.registry = Registry(bank.slots)
        self.attachments = Attachments()
        self._bank = bank
        self._canary = canary or Canary({})
        self._changes: deque[_Change] = deque()
        self._watch = Watch(self._canary, self.attachments)
        self._changed_itself = False
        self._gates = GateCounts(bank, self.registry)

    # Requests

    def check_selection(self, names: tuple[str, ...] | None) -> None:
        """Raise NotFound or BadRequest if a request's selection cannot be served."""
        if names is None:
            return
        self.registry.resolve(names)
        if len(set(names)) > self._bank.slots:
            raise BadRequest(f"at most {self._bank.slots} adapters can act at once", param="adapters")

    def admit(self, request: Request, *, may_copy: bool) -> bool:
        """Fix the request's selection and hold it; False while some of it is not attached.

        With `may_copy` what is missing is set about to be attached.

        Raises NotFound if a name is gone, Unavailable if pinned adapters leave the selection no room.
        """
        selection = request.selection
        if selection is None:
            selection = self.registry.resolve(request.submit.adapters)
        for version in selection:
            if version.slot is not None or not may_copy:
                continue
            if not self._start_copy(version, time.perf_counter(), beside=selection):
                self._check_room(selection)
        if not all(version.attached for version in selection):
            return False
        if request.selection is None:
            request.selection = selection
            self.registry.hold(selection)
        return True

    def release(self, request: Request) -> None:
        """The request ended: its versions may leave their slots."""
        if request.selection is not None:
            self._release(request.selection)
            request.selection = None

    def label(self, request: Request) -> int:
        """Row of the cross statistics that the request's tokens count under."""
        # A name that was unloaded meanwhile must not come back as a time series.
        late = any(version.retired for version in request.selection or ())
        return self._gates.row(OTHER if late else request.submit.selected)

    def shares(self, fired_S: tuple[int, ...], selection: Selection) -> dict[str, float]:
        """Share of an adapter's blocks that fired at a token, by adapter."""
        return {v.name: fired_S[v.slot] / v.payload.depth for v in selection if v.slot is not None and fired_S}

    # Changes

    def load(self, message: LoadAdapter, adapter: Adapter, answer: Future[AdapterView], started: float) -> None:
        """Start to attach a checked adapter; `answer` gets its view once it is published, or the error."""
        try:
            self.registry.check_name(message.name, replace=message.replace)
            self._bank.check_fits(adapter)
            threshold = adapter.info.threshold if message.threshold is None else message.threshold
            _check_threshold(threshold)
        except NrError as error:
            answer.set_exception(error)
            return
        version = Version(message.name, adapter.version, adapter, threshold)
        if self._start_copy(version, started, answer=answer, load=message):
            return
        if self._canary.max_leak is not None:
            answer.set_exception(_unmeasured(version))
            return
        # Every slot is in use: it is registered, and attached when one comes free or somebody asks for it.
        self._publish(_Change(version, iter(()), None, started, answer, message))

    def unload(self, name: str) -> AdapterView:
        """Forget a name; running requests keep the version they hold. Raises NotFound."""
        self._gates.read()
        version = self.registry.get(name)
        view = self.view(version)
        self._watch.unloaded(version)
        self._detach(self.registry.remove(name))
        self._gates.forget(name)
        return view

    def patch(self, message: PatchAdapter, answer: Future[AdapterView]) -> None:
        """Turn an adapter's dials; `answer` gets its view, or the error.

        With a limit a new threshold acts only once the leak at it is known.
        """
        try:
            version = self.registry.get(message.name)
            if message.threshold is not None:
                _check_threshold(message.threshold)
                if self._must_measure(version, message.threshold):
                    self._start_patch(version, message, message.threshold, answer)
                    return
        except NrError as error:
            answer.set_exception(error)
            return
        self._turn(version, message)
        answer.set_result(self.view(version))

    @property
    def busy(self) -> bool:
        """Whether weights are on their way into a slot, or an adapter is being measured."""
        return bool(self._changes or self._watch)

    def copy_some(self, seconds: float = COPY_SECONDS) -> None:
        """Copy weights for about so long, at least a layer; publish what is ready."""
        end = time.perf_counter() + seconds
        while self._changes:
            change = self._changes[0]
            for _ in change.copying:
                if time.perf_counter() >= end:
                    return
            change.copied = True
            if change.measurement is not None and not self._canary.may_act(change.measurement):
                return
            self._changes.popleft()
            self._finish(change)

    def trial(self, most: int) -> Probe | None:
        """What to run of the probe texts with the next step, at most so many tokens; `tried` takes its result.

        What waits to act goes before what acts already, and nothing is measured while weights are copied.
        """
        measurement = self._to_measure()
        return None if measurement is None else self._canary.probe(measurement, most)

    def tried(self, probe: Probe, result: Result) -> None:
        """Take what running the probe gave; an adapter that is found out is refused, or unloaded."""
        if probe.measurement.acts:
            self._try_behind(probe, result)
            return
        try:
            self._canary.add(probe, result)
        except NrError as error:
            self._refuse(self._changes.popleft(), error)

    def take_changed(self) -> bool:
        """Whether names or versions changed, since the last time, without anybody asking for it."""
        changed, self._changed_itself = self._changed_itself, False
        return changed

    def abandon(self, error: NrError) -> None:
        """Answer every load and patch under way with `error`: the engine is at its end."""
        for change in self._changes:
            if change.answer is not None:
                change.answer.set_exception(error)
        self._changes.clear()
        self._watch.stop()

    # Reading

    def view(self, version: Version) -> AdapterView:
        """What people see of a version."""
        adapter = version.payload
        copying = version.slot is not None and not version.attached
        return AdapterView(
            name=version.name,
            version=version.digest,
            domain=adapter.info.domain,
            state="attached" if version.attached else "loading" if copying else "registered",
            slot=version.slot,
            nbytes=adapter.nbytes,
            h=adapter.h,
            carry=adapter.info.carry,
            threshold=version.threshold,
            pinned=version.pinned,
            requests=self.registry.requests(version.name),
            loaded_at=version.loaded_at,
            load_seconds=version.load_seconds,
            gates=self._gates.of(version.name),
            neutrality=self._canary.report(version),
            measuring=self._watch.measuring(version),
        )

    def views(self) -> tuple[AdapterView, ...]:
        """Every registered adapter, by name."""
        self._gates.read()
        return tuple(self.view(version) for version in self.registry)

    def gates(self) -> tuple[dict[str, AdapterGates], dict[tuple[str, str], int]]:
        """Gate totals of every registered adapter, and who fired on whose traffic."""
        self._gates.read()
        return {version.name: self._gates.of(version.name) for version in self.registry}, self._gates.cross()

    # Inside

    def _start_copy(
        self,
        version: Version,
        started: float,
        *,
        beside: Selection = (),
        answer: Future[AdapterView] | None = None,
        load: LoadAdapter | None = None,
    ) -> bool:
        """Give the version a slot and start to fill it; False if none can be had."""
        slot = self.registry.find_slot(beside)
        if slot is None:
            return False
        self._gates.read()  # what was counted in the slot so far belongs to whoever leaves it
        evicted = self.registry.in_slot(slot)
        self.registry.place(version, slot)
        self._shut(slot)
        # Shut until it is finished: what is measured may be refused, and must not be observed meanwhile.
        copying = self._bank.attach(slot, version.payload, math.inf)
        measurement = self._canary.begin(version, version.threshold)
        self._changes.append(_Change(version, copying, measurement, started, answer, load, evicted=evicted))
        return True

    def _to_measure(self) -> Measurement | None:
        if self._changes:
            change = self._changes[0]
            return change.measurement if change.copied else None
        return self._watch.next()

    def _try_behind(self, probe: Probe, result: Result) -> None:
        measurement = probe.measurement
        if not self._watch.wants(measurement):
            return  # it went with a request that ended
        try:
            self._canary.add(probe, result)
        except NrError as error:
            self._watch.failed(measurement)
            self._found_out(measurement.version, error)
        else:
            if self._canary.done(measurement):
                self._watch.done(measurement)

    def _must_measure(self, version: Version, threshold: float) -> bool:
        """Whether a threshold must wait for its turn to be measured.

        If any leak is taken it is measured afterwards, in a slot.
        """
        if self._canary.max_leak is None:
            return False
        if any(change.patch is not None and change.version is version for change in self._changes):
            return True  # the last to ask must be the last to act
        return self._canary.must_measure(version, threshold)

    def _start_patch(
        self, version: Version, message: PatchAdapter, threshold: float, answer: Future[AdapterView]
    ) -> None:
        started = time.perf_counter()
        if version.slot is None and not self._start_copy(version, started):
            raise _unmeasured(version)
        self.registry.keep(version)
        measurement = self._canary.begin(version, threshold)
        self._changes.append(_Change(version, iter(()), measurement, started, answer, patch=message))

    def _pinned(self, message: LoadAdapter) -> bool:
        """Whether the version is pinned that takes its name now: as asked, else as the one it replaces."""
        if message.pinned is not None:
            return message.pinned
        return message.name in self.registry and self.registry.get(message.name).pinned

    def _check_room(self, selection: Selection) -> None:
        """Raise Unavailable if the selection can get its slots only once somebody unpins or unloads."""
        pinned = sum(v.pinned and v.slot is not None and v not in selection for v in self.registry)
        if len(selection) + pinned > self._bank.slots:
            names = ", ".join(v.name for v in selection)
            raise Unavailable(f"no slot for {names}: {pinned} of {self._bank.slots} hold pinned adapters")

    def _fill_free_slots(self) -> None:
        """Attach registered adapters that found no slot before, the newest first."""
        for version in sorted(self.registry, key=lambda v: -v.loaded_at):
            if self.registry.slots_used == self._bank.slots:
                return
            if version.slot is None:
                self._start_copy(version, time.perf_counter())

    def _finish(self, change: _Change) -> None:
        version = change.version
        if change.patch is not None:
            self._finish_patch(change, change.patch)
            return
        self._open(version, change.measurement)
        if change.answer is not None:
            self._publish(change)
        else:
            self._detach(self.registry.attach(version))

    def _finish_patch(self, change: _Change, patch: PatchAdapter) -> None:
        assert change.answer is not None
        version = change.version
        self._let_go(version)
        if version.retired:
            change.answer.set_exception(Conflict(f"adapter {version.name!r} was replaced or unloaded meanwhile"))
        else:
            self._turn(version, patch)
            change.answer.set_result(self.view(version))

    def _refuse(self, change: _Change, error: NrError) -> None:
        """The canary said no: leave everything as it was."""
        if change.answer is None:
            # It was registered before it could be measured, so it is served.
            log.error("adapter %s, version %s: %s", change.version.name, change.version.digest, error.message)
            self._finish(change)
            return
        if change.patch is not None:
            self._let_go(change.version)
        else:
            self._take_back(change)
        change.answer.set_exception(error)

    def _take_back(self, change: _Change) -> None:
        """Empty the slot of a version that will not be published, for whoever was there before."""
        for slot in self.registry.displace(change.version):
            self._shut(slot)
        before = change.evicted
        if before is not None and before.slot is None and not before.retired:
            self._start_copy(before, time.perf_counter())
        self._fill_free_slots()

    def _turn(self, version: Version, patch: PatchAdapter) -> None:
        if patch.pinned is not None:
            version.pinned = patch.pinned
            self._watch.pins(version, patch.pinned)
        if patch.threshold is not None:
            self._watch.turns(version, patch.threshold)
            version.threshold = patch.threshold
            if version.attached and version.slot is not None:
                self._open(version)

    def _publish(self, change: _Change) -> None:
        assert change.answer is not None
        assert change.load is not None
        version = change.version
        try:
            self.registry.check_name(version.name, replace=change.load.replace)
        except NrError as error:  # somebody else took the name while this was copied
            self._take_back(change)
            change.answer.set_exception(error)
            return
        version.pinned = self._pinned(change.load)  # not before: that one's pin may have been turned meanwhile
        if version.slot is not None:
            self.registry.attach(version)
        if version.name in self.registry:
            self._watch.replaces(version, self.registry.get(version.name))
        self._take_name(version)
        version.load_seconds = time.perf_counter() - change.started
        change.answer.set_result(self.view(version))

    def _take_name(self, version: Version) -> None:
        """From now on the version is what its name means."""
        self._gates.read()
        self._detach(self.registry.publish(version))
        self._fill_free_slots()

    def _release(self, selection: Selection) -> None:
        if any(version.retired for version in selection):
            self._gates.read()
        self._detach(self.registry.release(selection))

    def _let_go(self, version: Version) -> None:
        if version.retired:
            self._gates.read()
        self._detach(self.registry.let_go(version))

    def _detach(self, slots: list[int]) -> None:
        for slot in slots:
            self._shut(slot)
        if slots:
            self._fill_free_slots()

    def _open(self, version: Version, measurement: Measurement | None = None) -> None:
        """What is in the version's slot acts from the next step on; its leak, if not known, is measured then."""
        assert version.slot is not None
        self._bank.set_threshold(version.slot, version.threshold)
        self.attachments.put(version.slot)
        self._watch.opened(version, version.slot, measurement)

    def _found_out(self, version: Version, error: NrError) -> None:
        """An adapter that acts already could not be measured: what acted before it is put back."""
        log.error("adapter %s, version %s: %s", version.name, version.digest, error.message)
        if not isinstance(error, BadAdapterFile):
            return
        self._changed_itself = True
        before = self._watch.put_back(version)
        if before is None:
            self.unload(version.name)
            return
        log.warning(
            "adapter %s: version %s is put back, at threshold %g", before.name, before.digest, before.threshold
        )
        self._take_name(before)

    def _shut(self, slot: int) -> None:
        self._bank.detach(slot)
        self.attachments.remove(slot)


def _unmeasured(version: Version) -> Unavailable:
    return Unavailable(
        f"adapter {version.name!r} cannot be measured, as --max-leak demands: every slot is in use; try again later"
    )


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= MAX_THRESHOLD:
        raise BadRequest(f"threshold must be from 0 to {MAX_THRESHOLD:g}", param="threshold")
