"""The registry: names, versions, slots, pins, and which requests hold what. Torch-free.

A version is *registered* (in host memory), then *attached* (in a slot and published). More versions can be
registered than there are slots: a wanted one takes the slot of the least recently used that is neither pinned
nor in use, held by a request or kept for a change of it. A version that was replaced or unloaded is *retired*:
new requests cannot select it, and its slot is freed once it is in use no more.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nr_serve.errors import Conflict, NotFound

if TYPE_CHECKING:
    from nr_serve.neutral.format import Adapter


@dataclass(eq=False, slots=True)
class Version:
    """One adapter's content under a name. Compared by identity: the same file loaded twice is two versions."""

    name: str
    digest: str
    payload: Adapter
    """The weights in host memory; opaque here."""
    threshold: float
    pinned: bool = False
    slot: int | None = None
    attached: bool = False
    """Published: its slot holds all of it."""
    retired: bool = False
    requests: int = 0
    """Running requests that hold it."""
    kept: int = 0
    """Changes under way that need it in its slot. No request, so people do not see them."""
    used: int = 0
    """When it was last selected, as a count of selections."""
    loaded_at: float = field(default_factory=time.time)
    load_seconds: float = 0.0

    @property
    def in_use(self) -> bool:
        """Whether somebody needs it to stay in its slot."""
        return self.requests > 0 or self.kept > 0

    def again(self) -> Version:
        """The same, not in a slot."""
        return Version(self.name, self.digest, self.payload, self.threshold, pinned=self.pinned)


Selection = tuple[Version, ...]
"""The versions one request may use, in no particular order."""


class Registry:
    """Who is called what, and who sits in which slot."""

    def __init__(self, slots: int) -> None:
        self._by_name: dict[str, Version] = {}
        self._in_slot: list[Version | None] = [None] * slots
        self._selections = 0

    def __iter__(self) -> Iterator[Version]:
        return iter(sorted(self._by_name.values(), key=lambda v: v.name))

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def get(self, name: str) -> Version:
        """The current version of a name. Raises NotFound."""
        if name not in self._by_name:
            raise NotFound(f"no adapter is called {name!r}")
        return self._by_name[name]

    def in_slot(self, slot: int) -> Version | None:
        """Who sits in a slot, retired or not."""
        return self._in_slot[slot]

    def requests(self, name: str) -> int:
        """Running requests that hold any version of a name."""
        return sum(v.requests for v in self._in_slot if v is not None and v.name == name)

    @property
    def retired(self) -> set[Version]:
        """Retired versions that are in their slots yet."""
        return {v for v in self._in_slot if v is not None and v.retired}

    @property
    def slots(self) -> int:
        """Slots there are."""
        return len(self._in_slot)

    @property
    def slots_used(self) -> int:
        """Slots that hold or receive a version."""
        return sum(v is not None for v in self._in_slot)

    def check_name(self, name: str, *, replace: bool) -> None:
        """Raise Conflict if the name is taken and `replace` is not set."""
        if name in self._by_name and not replace:
            raise Conflict(f"an adapter called {name!r} is loaded already; use replace to load a new version")

    def publish(self, version: Version) -> list[int]:
        """Make `version` what its name means; the one before it is retired. The slots that came free."""
        old = self._by_name.get(version.name)
        self._by_name[version.name] = version
        return self._retire(old) if old is not None else []

    def remove(self, name: str) -> list[int]:
        """Unload a name. The slots that came free. Raises NotFound."""
        version = self.get(name)
        del self._by_name[name]
        return self._retire(version)

    def resolve(self, names: Sequence[str] | None) -> Selection:
        """The versions meant by a request: those named, or (None) every attached one. Raises NotFound."""
        if names is None:
            return tuple(v for v in self._by_name.values() if v.attached)
        return tuple(self.get(name) for name in dict.fromkeys(names))

    def find_slot(self, beside: Selection = ()) -> int | None:
        """A free slot, or the least recently used one that may be taken; None if there is none.

        Versions in `beside` are not moved.
        """
        free = next((slot for slot, version in enumerate(self._in_slot) if version is None), None)
        if free is not None:
            return free
        idle = [v for v in self._in_slot if v and v.attached and not (v.pinned or v.in_use or v in beside)]
        return min(idle, key=lambda v: v.used).slot if idle else None

    def place(self, version: Version, slot: int) -> None:
        """Give `version` a slot that `find_slot` found; it counts as attached only after `attach`."""
        occupant = self._in_slot[slot]
        if occupant is not None:
            self._vacate(occupant)
        version.slot = slot
        self._in_slot[slot] = version

    def attach(self, version: Version) -> list[int]:
        """Note that its slot holds all of it. The slots that came free (its own, if it was retired meanwhile)."""
        version.attached = True
        return self._free_if_done(version)

    def displace(self, version: Version) -> list[int]:
        """Take back the slot of a version that will not be published. The slots that came free."""
        return [self._vacate(version)] if version.slot is not None else []

    def hold(self, selection: Selection) -> None:
        """A request starts to use these versions."""
        self._selections += 1
        for version in selection:
            version.requests += 1
            version.used = self._selections

    def release(self, selection: Selection) -> list[int]:
        """A request stops using them. The slots that came free."""
        for version in selection:
            version.requests -= 1
        return [slot for version in selection for slot in self._free_if_done(version)]

    def keep(self, version: Version) -> None:
        """A change of this version begins: it stays in its slot meanwhile."""
        version.kept += 1

    def let_go(self, version: Version) -> list[int]:
        """The change has ended. The slots that came free."""
        version.kept -= 1
        return self._free_if_done(version)

    def check(self) -> None:
        """Integrity while no request runs: nothing is held, no slot is lost. Raises RuntimeError."""
        for slot, version in enumerate(self._in_slot):
            if version is None:
                continue
            if version.in_use or version.slot != slot or (version.attached and version.retired):
                raise RuntimeError(f"slot {slot} is lost to {version.name}@{version.digest}")

    def _retire(self, version: Version) -> list[int]:
        version.retired = True
        return self._free_if_done(version)

    def _free_if_done(self, version: Version) -> list[int]:
        # One whose copy is under way keeps its slot until the copy ends: the slot is being written.
        done = version.retired and version.attached and not version.in_use
        return [self._vacate(version)] if done else []

    def _vacate(self, version: Version) -> int:
        slot = version.slot
        assert slot is not None
        self._in_slot[slot] = None
        version.slot, version.attached = None, False
        return slot
