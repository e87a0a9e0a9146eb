"""Names, versions, slots and pins, over random walks held against a model that keeps no slots of its own."""

import random

import pytest

from nr_serve.engine.adapters.registry import Registry, Version
from nr_serve.errors import Conflict, NotFound
from tests.unit.fake_bank import FakeBank

NAMES = "abcdefg"


def version(name: str, digest: str = "", *, pinned: bool = False) -> Version:
    return Version(name, digest, payload=None, threshold=0.0, pinned=pinned)


def place(registry: Registry, new: Version, beside=()) -> int | None:
    slot = registry.find_slot(beside)
    if slot is not None:
        registry.place(new, slot)
    return slot


def loaded(registry: Registry, name: str, **options) -> Version:
    new = version(name, **options)
    if place(registry, new) is not None:
        registry.attach(new)
    registry.publish(new)
    return new


class Walk:
    """A random user of the registry. `slots` is what it was told, call by call, and nothing else."""

    def __init__(self, seed: int, slots: int) -> None:
        self.rng = random.Random(seed)
        self.registry = Registry(FakeBank(slots))
        self.slots: dict[int, Version] = {}
        self.copying: dict[Version, bool] = {}  # to publish when done?
        self.current: dict[str, Version] = {}
        self.held: list[tuple[Version, ...]] = []
        self.kept: list[Version] = []  # for a change, once for each
        self.last_used: dict[Version, int] = {}
        self.clock = 0
        self.seen = {"evicted": 0, "drained": 0, "no slot": 0, "conflicts": 0}

    def holders(self, of: Version) -> int:
        return sum(of in selection for selection in self.held)

    def in_use(self, of: Version) -> bool:
        return of in self.kept or self.holders(of) > 0

    def place(self, new: Version, beside=()) -> None:
        attached = {slot: v for slot, v in self.slots.items() if v not in self.copying}
        takeable = {
            slot: v for slot, v in attached.items() if not (v.pinned or self.in_use(v) or v in beside or v.retired)
        }
        free = set(range(self.registry.slots)) - self.slots.keys()
        slot = place(self.registry, new, beside)
        if free:
            assert slot in free
        elif takeable:
            oldest = min(self.last_used[v] for v in takeable.values())
            assert self.last_used[takeable[slot]] == oldest, "not the least recently used was taken"
            assert takeable[slot].slot is None
            self.seen["evicted"] += 1
        else:
            assert slot is None
            self.seen["no slot"] += 1
            return
        self.slots[slot] = new

    def freed(self, expected: set[Version]) -> None:
        """The slots of `expected` came free, and no others."""
        gone = {slot: v for slot, v in self.slots.items() if self.registry.in_slot(slot) is None}
        assert set(gone.values()) == expected
        for slot in gone:
            del self.slots[slot]
        self.seen["drained"] += len(gone)

    def load(self) -> None:
        new = version(self.rng.choice(NAMES), str(self.clock), pinned=self.rng.random() < 0.2)
        self.place(new)
        if new.slot is not None:
            self.copying[new] = True
        elif self.rng.random() < 0.5:
            self.publish(new)

    def publish(self, new: Version) -> None:
        old = self.current.get(new.name)
        if old is not None and self.rng.random() < 0.2:  # as when somebody else took the name meanwhile
            with pytest.raises(Conflict):
                self.registry.check_name(new.name, replace=False)
            gone = {new} if new.slot is not None else set()
            self.registry.displace(new)
            self.freed(gone)
            self.seen["conflicts"] += 1
            return
        self.registry.check_name(new.name, replace=True)
        if new.slot is not None:
            self.attach(new)
            self.freed(set())
        gone = {old} if old and old in self.slots.values() and not self.in_use(old) else set()
        self.registry.publish(new)
        self.freed(gone - self.copying.keys())
        self.current[new.name] = new

    def attach(self, new: Version) -> None:
        self.clock += 1
        self.registry.attach(new)
        self.last_used[new] = self.clock

    def finish_copy(self) -> None:
        if not self.copying:
            return
        new = self.rng.choice(list(self.copying))
        if self.copying.pop(new):
            self.publish(new)
        else:
            self.attach(new)
            self.freed({new} if new.retired and not self.in_use(new) else set())

    def remove(self) -> None:
        name = self.rng.choice(NAMES)
        if name not in self.current:
            with pytest.raises(NotFound):
                self.registry.remove(name)
            return
        old = self.current.pop(name)
        idle = old in self.slots.values() and old not in self.copying and not self.in_use(old)
        self.registry.remove(name)
        self.freed({old} if idle else set())

    def request(self) -> None:
        names = self.rng.sample(sorted(self.current), min(len(self.current), self.rng.randint(0, 2)))
        selection = self.registry.resolve(None if self.rng.random() < 0.2 else names + names[:1])
        if len(selection) == len(names):
            assert all(v is self.current[v.name] for v in selection)
        for each in selection:
            if each.slot is None:
                self.place(each, beside=selection)
                if each.slot is not None:
                    self.copying[each] = False
        if all(v.attached for v in selection):
            self.clock += 1
            self.registry.hold(selection)
            self.held.append(selection)
            self.last_used |= dict.fromkeys(selection, self.clock)

    def end_request(self) -> None:
        if not self.held:
            return
        selection = self.held.pop(self.rng.randrange(len(self.held)))
        done = {v for v in selection if v.retired and not self.in_use(v)}
        self.registry.release(selection)
        self.freed(done)

    def keep(self) -> None:
        in_slots = [each for each in self.current.values() if each.slot is not None]
        if in_slots:
            self.kept.append(self.rng.choice(in_slots))
            self.registry.keep(self.kept[-1])

    def let_go(self) -> None:
        if not self.kept:
            return
        each = self.kept.pop(self.rng.randrange(len(self.kept)))
        done = each.retired and each not in self.copying and not self.in_use(each)
        self.registry.let_go(each)
        self.freed({each} if done else set())

    def pin(self) -> None:
        if self.current:
            each = self.rng.choice(list(self.current.values()))
            each.pinned = not each.pinned

    def check(self) -> None:
        registry = self.registry
        for slot in range(registry.slots):
            there = registry.in_slot(slot)
            assert there is self.slots.get(slot)
            assert there is None or there.slot == slot
        assert registry.slots_used == len(self.slots)
        assert list(registry) == [self.current[name] for name in sorted(self.current)]
        every = {*self.current.values(), *self.slots.values(), *(v for s in self.held for v in s)}
        for each in every:
            assert each.requests == self.holders(each)
            assert (each.slot is not None) == (each in self.slots.values())
            assert each.attached == (each in self.slots.values() and each not in self.copying)
            if each.requests:
                assert each.attached, "a running request lost its adapter"
            if each in self.kept:
                assert each.slot is not None, "a change lost its adapter"
            assert each.retired == (self.current.get(each.name) is not each and not self.copying.get(each, False))
        attached = [v for v in self.current.values() if v.attached]
        assert set(registry.resolve(None)) == set(attached)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_walk_keeps_every_promise(seed):
    walk = Walk(seed, slots=seed % 4 + 1)
    moves = {
        walk.load: 4,
        walk.finish_copy: 6,
        walk.remove: 1,
        walk.request: 5,
        walk.end_request: 4,
        walk.keep: 1,
        walk.let_go: 1,
        walk.pin: 1,
    }
    for _ in range(1500):
        walk.rng.choices(list(moves), list(moves.values()))[0]()
        walk.check()
    while walk.copying:
        walk.finish_copy()
    while walk.held:
        walk.end_request()
        walk.check()
    while walk.kept:
        walk.let_go()
        walk.check()
    walk.registry.check()
    assert all(walk.seen.values()), walk.seen


def test_the_least_recently_used_leaves_and_the_pinned_stay():
    registry = Registry(FakeBank(3))
    a, b, c = (loaded(registry, name) for name in "abc")
    for selection in ((b,), (a,), (c,), (b,)):
        registry.hold(selection)
        registry.release(selection)
    a.pinned = True
    loaded(registry, "d")
    assert (a.attached, b.attached, c.attached) == (True, True, False)


def test_a_version_that_was_replaced_keeps_its_slot_until_its_last_request_ends():
    registry = Registry(FakeBank(2))
    old = loaded(registry, "a")
    registry.hold((old,))
    registry.hold((old,))
    new = version("a")
    place(registry, new)
    registry.attach(new)
    registry.publish(new)
    assert registry.resolve(["a"]) == (new,)
    assert registry.resolve(None) == (new,)
    registry.release((old,))
    assert registry.in_slot(0) is old
    registry.release((old,))
    assert registry.in_slot(0) is None


def test_a_version_unloaded_while_it_is_copied_keeps_its_slot_until_the_copy_ends():
    registry = Registry(FakeBank(1))
    late = version("a")
    registry.publish(late)
    assert place(registry, late) == 0
    registry.remove("a")
    assert place(registry, version("b")) is None, "the slot is being written"
    registry.attach(late)
    assert registry.in_slot(0) is None
    assert registry.resolve(None) == ()


def test_versions_wanted_together_do_not_push_each_other_out():
    registry = Registry(FakeBank(2))
    a, _ = (loaded(registry, name) for name in "ab")
    c, d = version("c"), version("d")
    registry.publish(c)
    registry.publish(d)
    wanted = (a, c)
    assert place(registry, c, wanted) == 1
    registry.attach(c)
    assert place(registry, d, (a, c, d)) is None


def test_names_are_refused_by_what_is_wrong_with_them():
    registry = Registry(FakeBank(1))
    loaded(registry, "a")
    with pytest.raises(Conflict, match="'a' is loaded already"):
        registry.check_name("a", replace=False)
    registry.check_name("a", replace=True)
    registry.check_name("b", replace=False)
    with pytest.raises(NotFound, match="'b'"):
        registry.resolve(["a", "b"])
    assert "a" in registry
    assert "b" not in registry


def test_a_version_kept_for_a_change_stays_and_counts_as_no_request():
    registry = Registry(FakeBank(1))
    a = loaded(registry, "a")
    registry.keep(a)
    assert registry.requests("a") == 0
    assert registry.find_slot() is None
    registry.hold((a,))
    assert registry.requests("a") == 1
    registry.remove("a")
    registry.release((a,))
    assert registry.in_slot(0) is a
    registry.let_go(a)
    assert registry.in_slot(0) is None


@pytest.mark.parametrize("how", ["held", "kept", "retired"])
def test_a_slot_that_nobody_will_free_is_lost_when_nothing_runs(how):
    registry = Registry(FakeBank(1))
    a = loaded(registry, "a")
    if how == "held":
        registry.hold((a,))
    elif how == "kept":
        registry.keep(a)
    else:
        a.retired = True
    with pytest.raises(RuntimeError, match="slot 0 is lost to a"):
        registry.check()
