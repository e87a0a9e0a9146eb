"""The adapters in the engine: what requests hold, commands, changes under way, and views. Torch-free.

Everything here runs on the engine's thread, between steps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from nr_serve.engine.adapters.canary import Canary, Probe
from nr_serve.engine.adapters.changes import Changes, Order
from nr_serve.engine.adapters.registry import Registry, Selection, Version
from nr_serve.engine.adapters.watch import Watch
from nr_serve.engine.messages import AdapterView, LoadAdapter, PatchAdapter
from nr_serve.engine.request import Request
from nr_serve.engine.scheduler import Result
from nr_serve.errors import BadAdapterFile, BadRequest, NrError, Unavailable
from nr_serve.names import OTHER
from nr_serve.neutral import MAX_THRESHOLD

if TYPE_CHECKING:
    from nr_serve.neutral.bank import Bank
    from nr_serve.neutral.format import Adapter

log = logging.getLogger(__name__)
COPY_SECONDS = 0.001  # spent copying weights between two steps: too short to slow a stream


class Adapters:
    """Loads, replaces, unloads and attaches adapters while steps run."""

    def __init__(self, bank: Bank, canary: Canary | None = None) -> None:
        """Without a `canary`, no leak is measured."""
        self._bank = bank
        self._canary = canary or Canary({})
        self.registry = Registry(bank)
        self._watch = Watch(self._canary, self.registry.attachments)
        self._changes = Changes(self.registry, self._canary, self._watch, self.view, self._reject_served)
        self._waits: Request | None = None  # for slots that are in use
        self._changed_itself = False
        self._loads_failed = 0

    # Requests

    def check_selection(self, names: tuple[str, ...] | None) -> None:
        """Raise NotFound or BadRequest if a request's selection cannot be served."""
        if names is None:
            return
        self.registry.resolve(names)
        if len(set(names)) > self._bank.slots:
            raise BadRequest(f"at most {self._bank.slots} adapters can act at once", param="adapters")

    def admit(self, request: Request, *, may_copy: bool) -> bool:
        """Fix the request's selection and hold it; False while some of its adapters are not attached.

        With `may_copy` what is missing is set about to be attached, or others are to leave their slots for it.

        Raises NotFound if a name is gone, Unavailable if pinned adapters leave too few slots for the selection.
        """
        selection = request.selection
        if selection is None:
            selection = self.registry.resolve(request.submit.adapters)
        if may_copy:
            self._attach(request, selection)
        if not all(version.attached for version in selection):
            return False
        if request.selection is None:
            request.selection = selection
            self.registry.hold(selection)
        return True

    def delays(self, request: Request) -> bool:
        """Whether it names an adapter whose slot another request waits for."""
        return any(v.name in (request.submit.adapters or ()) and not v.retired for v in self.registry.leaving)

    def release(self, request: Request) -> None:
        """The request ended, wherever it was: its versions may leave their slots."""
        if request is self._waits:
            self._waits = None
            self.registry.leaving.clear()
        if request.selection is not None:
            self.registry.release(request.selection)
            self._changes.fill()
            request.selection = None

    def labels(self, requests: Sequence[Request]) -> list[int]:
        """Rows of the cross statistics that the requests' tokens count under."""
        # A name that was unloaded meanwhile must not come back as a time series.
        known = [all(name in self.registry for name in r.submit.adapters or ()) for r in requests]
        names = [r.submit.selected if each else OTHER for r, each in zip(requests, known, strict=True)]
        return [self.registry.counts.row(name) for name in names]

    def shares(self, fired_TS: Sequence[tuple[int, ...]], selection: Selection) -> list[dict[str, float]]:
        """For each token of a piece, the share of each adapter's blocks that fired, by adapter name."""
        if not fired_TS:  # as of each step of each request that does not ask for it
            return []
        at = [(v.name, v.slot, v.payload.depth) for v in selection if v.slot is not None]
        return [{name: fired_S[slot] / depth for name, slot, depth in at if fired_S} for fired_S in fired_TS]

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
        version, order = Version(message.name, adapter.version, adapter, threshold), Order(message, answer, started)
        if self._changes.load(version, order):
            return
        if self._canary.max_leak is not None:
            answer.set_exception(_unmeasured(version))
            return
        # Every slot is in use: register the adapter now; it is attached when a slot is free or a request selects
        # it.
        self._changes.publish(version, order)

    def unload(self, name: str) -> AdapterView:
        """Forget a name; running requests keep the version they hold. Raises NotFound."""
        version = self.registry.get(name)
        view = replace(self.view(version), state="unloaded", slot=None)
        self._watch.unloaded(version)
        self.registry.remove(name)
        self._changes.fill()
        return view

    def patch(self, message: PatchAdapter, answer: Future[AdapterView]) -> None:
        """Change an adapter's settings; `answer` gets its view, or the error.

        With a leak limit, a new threshold acts only once the leak at that threshold is known.
        """
        try:
            version = self.registry.get(message.name)
            threshold = version.threshold if message.threshold is None else message.threshold
            _check_threshold(threshold)
            if self._must_wait(version, threshold):
                if not self._changes.patch(version, message, threshold, answer):
                    raise _unmeasured(version)
                return
        except NrError as error:
            answer.set_exception(error)
            return
        self._changes.turn(version, message)
        answer.set_result(self.view(version))

    @property
    def busy(self) -> bool:
        """Whether weights are being copied into a slot, or an adapter is to be measured."""
        return bool(self._changes or self._watch)

    def copy_some(self, seconds: float = COPY_SECONDS) -> None:
        """Copy weights for about `seconds`, at least a part of a layer; publish what is ready."""
        self._changes.copy_some(seconds)

    def next_probe(self, most: int) -> Probe | None:
        """The piece of a probe text to run with the next step, of at most `most` tokens; `take_result` is next.

        Adapters that wait to act are measured before those that act already. Nothing is measured while copying.
        """
        measurement = self._changes.to_measure() if self._changes else self._watch.next()
        return None if measurement is None else self._canary.probe(measurement, most)

    def take_result(self, probe: Probe, result: Result) -> None:
        """Take the result of a probe; an adapter that diverges is refused, or unloaded if it already acts."""
        probe.piece.request.selection = None  # the request is kept for later probes and must not hold the weights
        if probe.measurement.acts:
            self._try_in_background(probe, result)
            return
        try:
            self._canary.add(probe, result)
        except NrError as error:
            self._changes.refuse(error)

    def take_rejected(self) -> tuple[bool, int]:
        """Whether adapters changed without a command since the last call, and how many loads failed that way."""
        found, self._changed_itself, self._loads_failed = (self._changed_itself, self._loads_failed), False, 0
        return found

    def abandon(self, error: NrError) -> None:
        """Fail every load and patch under way with `error`: the engine is ending."""
        self._changes.abandon(error)

    # Reading

    def view(self, version: Version) -> AdapterView:
        """A version as clients see it."""
        self.registry.counts.read()
        return self._view(version)

    def views(self) -> tuple[AdapterView, ...]:
        """Every registered adapter as clients see it, by name."""
        self.registry.counts.read()
        return tuple(self._view(version) for version in self.registry)

    # Inside

    def _view(self, version: Version) -> AdapterView:
        """The view, with gate counts as of the last read."""
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
            routed=version.routed,
            requests=self.registry.requests(version.name),
            loaded_at=version.loaded_at,
            load_seconds=version.load_seconds,
            gates=self.registry.counts.of(version.name),
            neutrality=self._canary.report(version),
            measuring=self._watch.measuring(version),
        )

    def _attach(self, request: Request, selection: Selection) -> None:
        missing = [v for v in selection if v.slot is None and not self._changes.attach(v, beside=selection)]
        if missing:
            self._check_room(selection)
        if missing or request is self._waits:
            self._waits = request if missing else None
            self.registry.make_room(len(missing), selection)

    def _try_in_background(self, probe: Probe, result: Result) -> None:
        measurement = probe.measurement
        if not self._watch.wants(measurement):
            return  # its slot was freed with a request that ended
        try:
            self._canary.add(probe, result)
        except NrError as error:
            self._watch.failed(measurement)
            self._reject_served(measurement.version, error)
        else:
            if self._canary.done(measurement):
                self._watch.done(measurement)

    def _must_wait(self, version: Version, threshold: float) -> bool:
        """Whether a change must wait: for the leak at this threshold, or for earlier changes of the version.

        Without a leak limit nothing waits: the leak is measured afterwards.
        """
        if self._canary.max_leak is None:
            return False
        if self._changes.patches(version):
            return True  # changes must act in the order they were asked for
        return threshold != version.threshold and self._canary.must_measure(version, threshold)

    def _check_room(self, selection: Selection) -> None:
        """Raise Unavailable if the selection can get its slots only after an adapter is unpinned or unloaded."""
        pinned = sum(v.pinned and v.slot is not None and v not in selection for v in self.registry)
        if len(selection) + pinned > self._bank.slots:
            names = ", ".join(v.name for v in selection)
            raise Unavailable(f"no slot for {names}: {pinned} of {self._bank.slots} hold pinned adapters")

    def _reject_served(self, version: Version, error: NrError) -> None:
        """Handle a served adapter that could not be measured: if it diverged, put back what acted before it."""
        log.error("adapter %s, version %s: %s", version.name, version.digest, error.message)
        if not isinstance(error, BadAdapterFile):
            return
        self._changed_itself = True
        before = self._watch.put_back(version)
        # If the same version is put back, it diverged only at another threshold: no load failed.
        self._loads_failed += before is None or before.digest != version.digest
        if before is None:
            self.unload(version.name)
            return
        log.warning(
            "adapter %s: version %s is put back, at threshold %g", before.name, before.digest, before.threshold
        )
        self._changes.take_name(before)


def _unmeasured(version: Version) -> Unavailable:
    return Unavailable(
        f"adapter {version.name!r} cannot be measured, as --max-leak demands: every slot is in use; try again later"
    )


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= MAX_THRESHOLD:
        raise BadRequest(f"threshold must be from 0 to {MAX_THRESHOLD:g}", param="threshold")
