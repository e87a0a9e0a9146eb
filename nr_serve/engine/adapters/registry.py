"""The registry: names, versions, slots, pins, and which requests hold what. Torch-free.

A version is *registered* (in host memory), then *attached* (in a slot and published). More versions can be
registered than there are slots. A version that is wanted takes the slot of the least recently used version that is
not pinned and not in use (held by a request, or needed by a change under way). A version that was replaced or
unloaded is *retired*: new requests cannot select it, and its slot is freed when it is no longer in use.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nr_serve.engine.adapters.gate_counts import GateCounts
from nr_serve.engine.cache.neutrality import Attachments
from nr_serve.errors import Conflict, NotFound

if TYPE_CHECKING:
    from nr_serve.neutral.bank import Bank
    from nr_serve.neutral.format import Adapter


@dataclass(eq=False, slots=True)
class Version:
    """One adapter's content under a name. Compared by identity: one file loaded twice makes two versions."""

    name: str
    digest: str
    payload: Adapter
    """The weights in host memory; this module does not look into them."""
    threshold: float
    pinned: bool = False
    routed: bool = True
    """Whether requests that name no adapters may use it."""
    slot: int | None = None
    attached: bool = False
    """Whether it is published: its slot holds all its weights."""
    retired: bool = False
    requests: int = 0
    """Number of admitted requests that hold it."""
    kept: int = 0
    """Number of changes under way that need it in its slot. Not requests, so clients do not see them."""
    used: int = 0
    """When it was last selected or attached, in ticks of the registry's counter of uses."""
    loaded_at: float = field(default_factory=time.time)
    load_seconds: float = 0.0

    @property
    def in_use(self) -> bool:
        """Whether it must stay in its slot."""
        return self.requests > 0 or self.kept > 0

    def again(self) -> Version:
        """A copy that is in no slot."""
        return Version(self.name, self.digest, self.payload, self.threshold, self.pinned, self.routed)


Selection = tuple[Version, ...]
"""The versions one request may use, in no particular order."""


class Registry:
    """Owns which version each name means and which is in each slot, and the slots' attachments and gate counts.

    Gates counted in a slot belong to the version that leaves it, so the counts are read before it leaves. A freed
    slot's gates are shut at once.
    """

    def __init__(self, bank: Bank) -> None:
        self.slots = bank.slots
        self.attachments = Attachments()
        self.counts = GateCounts(bank, self)
        self.leaving: set[Version] = set()
        """Versions whose slots are waited for: the base's name does not select them."""
        self._bank = bank
        self._by_name: dict[str, Version] = {}
        self._in_slot: list[Version | None] = [None] * bank.slots
        self._uses = 0

    def __iter__(self) -> Iterator[Version]:
        return iter(sorted(self._by_name.values(), key=lambda v: v.name))

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def get(self, name: str) -> Version:
        """The current version of a name. Raises NotFound."""
        if name not in self._by_name:
            raise NotFound(f"no adapter is called {name!r}")
        return self._by_name[name]

    def resolve(self, names: Sequence[str] | None) -> Selection:
        """The versions meant by a request: those named, or (None) all that are routed, attached and stay.

        Raises NotFound.
        """
        if names is None:
            return tuple(v for v in self._by_name.values() if v.routed and v.attached and v not in self.leaving)
        return tuple(self.get(name) for name in dict.fromkeys(names))

    def in_slot(self, slot: int) -> Version | None:
        """The version in a slot, retired or not; None if the slot is free."""
        return self._in_slot[slot]

    def requests(self, name: str) -> int:
        """Admitted requests that hold any version of a name."""
        return sum(v.requests for v in self._in_slot if v is not None and v.name == name)

    @property
    def slots_used(self) -> int:
        """Number of slots that hold a version or are being filled."""
        return sum(v is not None for v in self._in_slot)

    # Names

    def check_name(self, name: str, *, replace: bool) -> None:
        """Raise Conflict if the name is taken and `replace` is not set."""
        if name in self._by_name and not replace:
            raise Conflict(f"an adapter called {name!r} is loaded already; use replace to load a new version")

    def publish(self, version: Version) -> None:
        """Make `version` the one its name means; the version before it is retired."""
        self.counts.read()  # an unloaded version's counts do not belong to the new one
        old = self._by_name.get(version.name)
        self._by_name[version.name] = version
        if old is not None:
            self._retire(old)

    def remove(self, name: str) -> None:
        """Unload a name and forget its counts. Raises NotFound."""
        version = self.get(name)
        self.counts.read()
        del self._by_name[name]
        self._retire(version)
        self.counts.forget(name)

    # Slots

    def find_slot(self, beside: Selection = ()) -> int | None:
        """A free slot, or that of the least recently used version that may be moved; None if there is neither.

        Versions in `beside` are not moved.
        """
        free = next((slot for slot, version in enumerate(self._in_slot) if version is None), None)
        if free is not None:
            return free
        idle = [v for v in self._in_slot if v and v.attached and not (v.pinned or v.in_use or v in beside)]
        return min(idle, key=lambda v: v.used).slot if idle else None

    def make_room(self, slots: int, beside: Selection) -> None:
        """Choose `slots` versions to leave: those that leave already, then the least recently used."""
        may_leave = [
            v for v in self._in_slot if v and (v.retired or (v.attached and not v.pinned and v not in beside))
        ]
        may_leave.sort(key=lambda v: (not v.retired, v not in self.leaving, v.used))
        self.leaving = set(may_leave[:slots])

    def place(self, version: Version, slot: int) -> Iterator[None]:
        """Copy `version` into a slot from `find_slot`; its weights are complete once the iterator is exhausted.

        Its gates stay shut until `open`: it may be refused after measuring, and must not act on answers before.
        """
        occupant = self._in_slot[slot]
        if occupant is not None:
            self._vacate(occupant)
        version.slot = slot
        self._in_slot[slot] = version
        return self._bank.attach(slot, version.payload, math.inf)

    def open(self, version: Version) -> int:
        """Let the version in its slot act, at its threshold, from the next step on. Returns its new attachment."""
        assert version.slot is not None
        self._bank.set_threshold(version.slot, version.threshold)
        return self.attachments.put(version.slot)

    def attach(self, version: Version) -> None:
        """Note that the slot holds the whole version; free the slot if the version was retired meanwhile."""
        version.attached = True
        self._uses += 1
        version.used = self._uses
        self._free_if_done(version)

    def displace(self, version: Version) -> None:
        """Free the slot, if it has one, of a version that will not be published."""
        if version.slot is not None:
            self._vacate(version)

    # Use

    def hold(self, selection: Selection) -> None:
        """Note that a request starts to use these versions."""
        self._uses += 1
        for version in selection:
            version.requests += 1
            version.used = self._uses

    def release(self, selection: Selection) -> None:
        """Note that a request stopped using these versions."""
        for version in selection:
            version.requests -= 1
            self._free_if_done(version)

    def keep(self, version: Version) -> None:
        """Note that a change of this version begins: it stays in its slot until `let_go`."""
        version.kept += 1

    def let_go(self, version: Version) -> None:
        """Note that a change of this version ended."""
        version.kept -= 1
        self._free_if_done(version)

    def check(self) -> None:
        """Check, while no request runs, that no version is held and no slot lost. Raises RuntimeError."""
        for slot, version in enumerate(self._in_slot):
            if version is None:
                continue
            if version.in_use or version.slot != slot or (version.attached and version.retired):
                raise RuntimeError(f"slot {slot} is lost to {version.name}@{version.digest}")

    def _retire(self, version: Version) -> None:
        version.retired = True
        self._free_if_done(version)

    def _free_if_done(self, version: Version) -> None:
        # A version that is still being copied keeps its slot until the copy ends: the slot is being written.
        if version.retired and version.attached and not version.in_use:
            self._vacate(version)

    def _vacate(self, version: Version) -> None:
        slot = version.slot
        assert slot is not None
        self.counts.read()
        self._in_slot[slot] = None
        version.slot, version.attached = None, False
        self.leaving.discard(version)
        self._bank.detach(slot)
        self.attachments.remove(slot)
