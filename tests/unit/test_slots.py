"""What goes with a slot from hand to hand: names, weights, attachments and counts, over a bank without tensors."""

import math

import pytest

from nr_serve.engine.adapters.registry import Registry, Version
from tests.unit.fake_bank import FakeAdapter, FakeBank


class Bench:
    """A registry over a fake bank."""

    def __init__(self, slots: int) -> None:
        self.bank = FakeBank(slots)
        self.registry = Registry(self.bank)

    def loaded(self, name: str, content: str = "x", meanwhile: Version | None = None) -> Version:
        """A version that acts; `meanwhile` another one runs for a token."""
        version = Version(name, content, FakeAdapter(content), 0.5)
        for _ in self.registry.place(version, self.registry.find_slot()):
            pass
        if meanwhile is not None:
            self.run(meanwhile, 1)
        self.registry.open(version)
        self.registry.attach(version)
        self.registry.publish(version)
        return version

    def run(self, version: Version, tokens: int) -> None:
        self.bank.count([version.slot], self.registry.counts.row("traffic"), tokens)

    def seen(self, name: str) -> int:
        self.registry.counts.read()
        return self.registry.counts.of(name).seen[-1]

    def acting(self) -> list[str | None]:
        """The content that acts in each slot; attachments must tell the same."""
        acts = [self.bank.acts(slot) for slot in range(self.bank.slots)]
        there = [slot for slot, each in enumerate(acts) if each is not None]
        assert self.registry.attachments.all == {self.registry.attachments[slot] for slot in there}
        return [None if each is None else each[0].version for each in acts]


def test_a_version_acts_from_open_on_and_not_before_its_weights_are_there():
    bench = Bench(1)
    version = Version("a", "x", FakeAdapter("x"), 0.5)
    copying = bench.registry.place(version, 0)
    for _ in copying:
        assert bench.acting() == [None]
    assert (bench.acting(), bench.registry.slots_used) == ([None], 1)
    assert bench.bank.thresholds == [math.inf]
    assert bench.registry.open(version) in bench.registry.attachments.all
    assert bench.bank.acts(0) == (version.payload, 0.5)


def test_whoever_is_placed_shuts_its_slot_at_once():
    bench = Bench(1)
    bench.loaded("a")
    bench.registry.place(Version("b", "y", FakeAdapter("y"), 0.5), 0)
    assert bench.acting() == [None]


def test_opened_again_it_is_another_attachment():
    bench = Bench(1)
    version = bench.loaded("a")
    before = bench.registry.attachments.all
    version.threshold = 0.7
    bench.registry.open(version)
    assert bench.bank.acts(0) == (version.payload, 0.7)
    assert before.isdisjoint(bench.registry.attachments.all)


def test_a_slot_is_shut_when_its_version_is_displaced():
    bench = Bench(1)
    version = bench.loaded("a")
    bench.registry.displace(version)
    assert (bench.acting(), bench.registry.slots_used) == ([None], 0)
    bench.registry.displace(version)  # it has none: nothing to take back


@pytest.mark.parametrize("use", ["request", "change"])
@pytest.mark.parametrize("how", ["replaced", "unloaded"])
def test_in_use_it_acts_on_until_it_is_let_go(use, how):
    bench = Bench(2)
    old = bench.loaded("a", "old")
    if use == "request":
        bench.registry.hold((old,))
    else:
        bench.registry.keep(old)
    if how == "replaced":
        bench.loaded("a", "new")
    else:
        bench.registry.remove("a")
    assert bench.acting()[0] == "old"
    bench.run(old, 7)
    if use == "request":
        bench.registry.release((old,))
    else:
        bench.registry.let_go(old)
    assert bench.acting()[0] is None
    assert bench.seen("a") == (7 if how == "replaced" else 0), "counts go with the name"


@pytest.mark.parametrize("leaves", ["evicted", "replaced", "unloaded"])
def test_what_was_counted_in_a_slot_belongs_to_whoever_left_it(leaves):
    bench = Bench(1 if leaves == "evicted" else 2)
    a = bench.loaded("a")
    bench.run(a, 3)
    if leaves == "evicted":
        b = bench.loaded("b", "y")
    elif leaves == "replaced":
        b = bench.loaded("a", "y", meanwhile=a)
    else:
        bench.registry.remove("a")
        b = bench.loaded("b", "y")
    bench.run(b, 4)
    assert (bench.seen("a"), bench.seen("b")) == {"evicted": (3, 4), "replaced": (8, 0), "unloaded": (0, 4)}[leaves]
    for name in "ab":
        counted = bench.registry.counts.of(name).fired_by_selected
        assert counted == ({"traffic": bench.seen(name)} if bench.seen(name) else {})


def test_what_an_unloaded_version_goes_on_to_count_is_not_its_names_that_is_loaded_again():
    bench = Bench(2)
    old = bench.loaded("a", "old")
    bench.registry.hold((old,))
    bench.registry.remove("a")
    bench.run(old, 7)
    bench.loaded("a", "new")
    assert bench.seen("a") == 0
