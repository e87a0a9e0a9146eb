"""An adapter that acts before it was measured, and is found wild: what it replaced is put back."""

import logging

import pytest

from nr_serve.engine.messages import StepEvents
from nr_serve.engine.scheduler import Result
from nr_serve.errors import BadAdapterFile, NotFound
from tests.unit.stepped import Probed, error_of


def find_out(server) -> StepEvents:
    """The next piece of probe text turns to NaN."""
    run, not_finite = server.runner.run, Result(None, error=BadAdapterFile("not finite"))
    server.runner.run = lambda pieces, labels: [*run(pieces, labels)[:-1], not_finite]
    events = server.step()
    server.runner.run = run
    return events


def replace_until_it_acts(server, seed) -> None:
    """Replace adapter a by another that begins well; its measurement goes on."""
    assert server.begin("a", server.made(seed), replace=True).measuring


def test_what_replaced_nothing_is_unloaded(caplog):
    server = Probed(slots=2)
    server.ask("beside", (), tokens=100)
    server.begin("a", server.made(1))
    server.ask("r", ("a",))
    server.step()
    with caplog.at_level(logging.ERROR):
        found = find_out(server)
    assert (found.adapters_changed, found.loads_failed) == (True, 1)
    after = server.step()
    assert (after.adapters_changed, after.loads_failed) == (False, 0)
    assert "adapter a, version v1: not finite" in caplog.text
    assert server.state("a") is None
    assert isinstance(error_of(server.patch("a", threshold=0.1)), NotFound)
    server.finish()
    assert server.tokens["r"] == server.expected(server.made(1)), "who holds it keeps it"
    assert server.adapters.registry.slots_used == 0


@pytest.mark.parametrize("slots", [1, 2])
def test_what_an_adapter_found_wild_had_replaced_is_put_back(slots):
    server = Probed(slots=slots)
    server.load("a", server.made(1), threshold=0.2, pinned=slots == 2, routed=slots == 2)
    known = server.view("a")
    server.ask("beside", (), tokens=200)
    for seed in (2, 3):  # the second takes the place of one that is not measured yet
        replace_until_it_acts(server, seed)
    assert find_out(server).loads_failed == 1
    back = server.view("a")
    assert (back.version, back.threshold, back.pinned) == (known.version, known.threshold, known.pinned)
    assert back.routed == known.routed == (slots == 2)
    assert (back.neutrality, back.measuring) == (known.neutrality, False), "its leak is known"
    server.work()
    assert server.state("a") == "attached"
    assert server.answer("r", ("a",)) == server.expected(server.made(1, threshold=0.2))


def test_what_is_put_back_goes_before_others_that_wait_for_a_slot():
    server = Probed(slots=1)
    for name, seed in (("a", 1), ("b", 2)):
        server.load(name, server.made(seed))
    server.ask("beside", (), tokens=200)
    replace_until_it_acts(server, 3)
    assert server.state("b") == "registered"
    find_out(server)
    server.work()
    assert (server.view("a").version, server.state("a"), server.state("b")) == ("v1", "attached", "registered")


def test_a_threshold_found_wild_goes_back_to_the_last_that_was_measured():
    server = Probed(slots=2)
    made = server.made(1, threshold=0.2)
    server.load("a", made)
    known = server.view("a")
    server.patch("a", threshold=0.1)
    server.patch("a", threshold=0.0, pinned=True)
    assert find_out(server).loads_failed == 0, "its threshold was wild, not what was loaded"
    back = server.view("a")
    assert (back.version, back.threshold, back.pinned) == (known.version, 0.2, True)
    server.work()
    assert (server.state("a"), server.neutrality("a")) == ("attached", known.neutrality)
    assert server.answer("r", ("a",)) == server.expected(made)
    server.patch("a", threshold=0.1)
    server.work()
    server.patch("a", threshold=0.0)
    find_out(server)
    assert server.view("a").threshold == 0.1


def test_back_at_a_measured_threshold_what_was_replaced_does_not_come_back():
    server = Probed(slots=2)
    server.load("a", server.made(2))
    server.load("a", server.made(1), replace=True)
    server.ask("beside", (), tokens=200)
    server.begin("a", server.made(2), threshold=0.3, replace=True)
    server.patch("a", threshold=0.0)
    server.patch("a", threshold=0.1)
    find_out(server)
    assert (server.view("a").version, server.view("a").threshold) == ("v2", 0.0)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_pin_turned_while_a_version_is_on_trial_is_kept_when_another_is_put_back(pinned):
    server = Probed(slots=2)
    server.load("a", server.made(1), pinned=not pinned)
    server.ask("beside", (), tokens=200)
    replace_until_it_acts(server, 2)
    server.patch("a", pinned=pinned)
    find_out(server)
    assert (server.view("a").version, server.view("a").pinned) == ("v1", pinned)


def test_what_was_replaced_by_an_adapter_that_was_measured_does_not_come_back():
    server = Probed(slots=2)
    server.load("a", server.made(1))
    server.load("a", server.made(2), replace=True)
    server.ask("beside", (), tokens=200)
    replace_until_it_acts(server, 3)
    find_out(server)
    assert server.view("a").version == "v2"
