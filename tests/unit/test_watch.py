"""What is measured behind what acts, and what comes back: the watch alone, with a canary that runs nothing."""

import pytest

from nr_serve.engine.adapters import canary
from nr_serve.engine.adapters.canary import Canary
from nr_serve.engine.adapters.registry import Version
from nr_serve.engine.adapters.watch import Watch
from nr_serve.engine.cache.neutrality import Attachments
from tests.unit.fake_bank import FakeAdapter, ran, texts


class Watched:
    """A watch, and versions that open in slots of their own."""

    def __init__(self) -> None:
        self.canary, self.attachments = Canary(texts()), Attachments()
        self.watch = Watch(self.canary, self.attachments)
        self.slots = 0

    def acts(self, content: str, threshold: float = 0.5, *, pinned: bool = False) -> Version:
        """A version that acts from now on."""
        version = Version("a", content, FakeAdapter(content), threshold, pinned=pinned, slot=self.slots)
        self.slots += 1
        self.open(version)
        return version

    def open(self, version: Version) -> None:
        self.watch.opened(version, self.attachments.put(version.slot), None)

    def replace(self, before: Version, content: str) -> Version:
        version = self.acts(content)
        self.watch.replaces(version, before)
        before.retired = True
        return version

    def turn(self, version: Version, threshold: float) -> None:
        self.watch.turns(version, threshold)
        version.threshold = threshold
        self.open(version)

    def measure(self) -> list[tuple[str, float]]:
        """Read all there is to read: what was measured, in order."""
        measured = []
        while (measurement := self.watch.next()) is not None:
            probe = self.canary.probe(measurement, most=3)
            self.canary.add(probe, ran(probe, slots=9))
            if self.canary.done(measurement):
                self.watch.done(measurement)
                measured.append((measurement.version.digest, measurement.threshold))
        return measured

    def comes_back(self, version: Version) -> tuple[str, float, bool] | None:
        back = self.watch.put_back(version)
        return None if back is None else (back.digest, back.threshold, back.slot is None)


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_what_acts_unmeasured_is_measured_in_turn_and_once(watched):
    versions = [watched.acts(content) for content in "xyx"]
    assert all(map(watched.watch.measuring, versions))
    assert watched.measure() == [("x", 0.5), ("y", 0.5), ("x", 0.5)]
    assert not watched.watch
    watched.acts("y")
    assert not watched.watch


def test_a_measurement_begun_before_it_acted_goes_on_unless_the_dial_was_turned(watched):
    version = Version("a", "x", FakeAdapter("x"), 0.5, slot=0)
    begun = watched.canary.begin(version, 0.5)
    watched.watch.opened(version, watched.attachments.put(0), begun)
    assert watched.watch.next() is begun
    version.threshold = 0.7
    watched.watch.opened(version, watched.attachments.put(0), begun)
    assert watched.measure() == [("x", 0.7)]


def test_of_more_reports_than_are_kept_the_oldest_is_forgotten(watched, monkeypatch):
    monkeypatch.setattr(canary, "MOST_REPORTS", 2)
    versions = [watched.acts(content) for content in "xyz"]
    watched.measure()
    assert [watched.canary.report(version) is None for version in versions] == [True, False, False]


@pytest.mark.parametrize("how", ["shut", "opened again", "retired"])
def test_what_acts_no_more_is_not_wanted(watched, how):
    version = watched.acts("x")
    measurement = watched.watch.next()
    if how == "shut":
        watched.attachments.remove(version.slot)
    elif how == "opened again":
        watched.open(version)
    else:
        version.retired = True
    assert not watched.watch.wants(measurement)
    assert watched.watch.measuring(version) == (how == "opened again")
    assert watched.measure() == ([("x", 0.5)] if how == "opened again" else [])


def test_what_failed_is_measured_no_further_and_may_still_be_put_back(watched):
    before = watched.acts("x")
    watched.measure()
    version = watched.replace(before, "y")
    watched.watch.failed(watched.watch.next())
    assert (bool(watched.watch), watched.watch.measuring(version)) == (False, False)
    assert watched.comes_back(version) == ("x", 0.5, True)


def test_the_last_that_was_measured_comes_back_once(watched):
    first = watched.acts("x")
    watched.measure()
    version = watched.replace(watched.replace(first, "y"), "z")
    assert watched.comes_back(version) == ("x", 0.5, True)
    assert watched.comes_back(version) is None


def test_nothing_comes_back_for_what_was_measured_or_unloaded_or_replaced_nothing(watched):
    measured = watched.replace(watched.acts("x"), "y")
    watched.measure()
    assert watched.comes_back(measured) is None
    unloaded = watched.replace(measured, "z")
    watched.watch.unloaded(unloaded)
    assert watched.comes_back(unloaded) is None
    assert watched.comes_back(watched.acts("w")) is None


def test_one_that_became_known_under_another_name_comes_back_itself(watched):
    first = watched.acts("x")
    watched.measure()
    second = watched.replace(first, "y")
    watched.attachments.remove(second.slot)
    watched.acts("y")  # elsewhere
    watched.measure()
    assert watched.comes_back(watched.replace(second, "z")) == ("y", 0.5, True)


def test_a_threshold_comes_back_if_it_was_measured(watched):
    version = watched.acts("x")
    watched.turn(version, 0.6)
    assert watched.comes_back(version) is None
    watched.measure()
    watched.turn(version, 0.7)
    watched.turn(version, 0.8)
    assert watched.comes_back(version) == ("x", 0.6, True)
    watched.turn(version, 0.6)
    watched.turn(version, 0.7)
    watched.turn(version, 0.6)
    assert watched.comes_back(version) is None, "it is back already"


@pytest.mark.parametrize("dial", ["pinned", "routed"])
def test_a_pin_or_a_route_is_of_the_name_whoever_bears_it(watched, dial):
    before = watched.acts("x", pinned=False)
    version = watched.replace(before, "y")
    turned = not getattr(before, dial)
    setattr(watched.watch.before(version), dial, turned)
    assert getattr(watched.watch.put_back(version), dial) is turned
