"""Adapters are run past the probe texts, and what is reported is what the definition gives."""

import dataclasses

import pytest

from nr_serve.engine import core as core_module
from nr_serve.engine.messages import Leak
from nr_serve.errors import BadRequest, Conflict, NotFound, Unavailable
from nr_serve.neutral import math
from tests import tiny
from tests.unit.stepped import ANSWER, PROMPT, TEXTS, Probed, error_of


def leak(ids, adapter, *, threshold=None, residues=True) -> Leak:
    """By the definition alone: the naive model's own pass over the whole text."""
    threshold = adapter.info.threshold if threshold is None else threshold
    adapter = dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, threshold=threshold))
    naive, fired = tiny.Naive(tiny.model()), 0
    add = naive._add

    def counting(layer, x, y):
        nonlocal fired
        block = adapter.blocks[layer]
        if block is not None:
            z = math.gate_logit(x[0], block.gate, block.bias)
            m = math.carry(z, adapter.info.carry)
            fired += int((math.block_gate(m, threshold) > 0).sum())
        return add(layer, x, y) if residues else y

    for layer in naive.model.model.layers:
        layer.mlp.add_residues = counting
    naive.logits(ids, [adapter])
    return Leak(fired, len(ids) * sum(block is not None for block in adapter.blocks), len(ids))


def leaks(adapter, **options) -> dict[str, Leak]:
    return {name: leak(ids, adapter, **options) for name, ids in TEXTS.items()}


def worst(adapter, **options) -> float:
    return max(each.rate for each in leaks(adapter, **options).values())


@pytest.mark.parametrize(
    "options",
    [{}, {"carry": 0.5, "threshold": 0.3}, {"carry": 0.5, "bare_layers": (1,)}, {"threshold": 1e6}],
    ids=str,
)
@pytest.mark.parametrize(
    ("piece_tokens", "beside", "max_leak"),
    [(1, False, None), (1000, False, 1.0), (1, True, None), (7, True, None), (7, True, 1.0)],
)
def test_the_leak_is_what_the_definition_gives_in_pieces_of_any_length(
    options, piece_tokens, beside, max_leak, monkeypatch
):
    server = Probed(slots=2, max_leak=max_leak)
    monkeypatch.setattr(core_module, "TRIAL_TOKENS", piece_tokens)
    monkeypatch.setattr(core_module, "TRIAL_TOKENS_BESIDE", piece_tokens)
    server.load("other", server.made(5))
    made = server.made(1, scale=20.0, **options)
    if beside:
        server.ask("r", ("other",), tokens=400)
    view = server.load("a", made).result(timeout=0)
    assert server.neutrality("a") == leaks(made)
    assert view.neutrality == (None if max_leak is None else leaks(made))
    assert server.neutrality("other") == leaks(server.made(5))
    assert ("r" in server.tokens, server.ended) == (beside, {})
    if "threshold" not in options or options["threshold"] < 1e6:
        assert leaks(made) != leaks(made, residues=False), "no early misfire moves a later gate: the test is blind"
    else:
        assert {each.rate for each in leaks(made).values()} == {0}


def test_answers_and_gate_statistics_are_the_same_with_a_load_in_their_midst():
    statistics = []
    for loads in (False, True):
        server = Probed(slots=3)
        b = server.made(2, carry=0.5)
        server.load("b", b)
        server.ask("on b", ("b",), selected="on b")
        server.ask("bare", (), selected="bare")
        server.step()
        if loads:
            answer = server.load("a", server.made(1), finish=False)
            while not answer.done():
                before = len(server.pieces)
                server.step()
                assert len(server.pieces) <= before + 1, "more than a piece between two steps"
            assert not server.ended, "the load was not in their midst"
        server.finish()
        assert server.tokens["on b"] == server.expected(b)
        assert server.tokens["bare"] == server.expected()
        statistics.append(server.core.statistics())
    quiet, loaded = statistics
    mass = pytest.approx(quiet.adapters["b"].gates.mass)  # a sum is rounded by what shares its step
    assert loaded.adapters["b"].gates == dataclasses.replace(quiet.adapters["b"].gates, mass=mass)
    assert quiet.adapters["b"].gates.seen[0] == len(PROMPT) + ANSWER - 1


def test_what_was_measured_before_is_not_measured_again():
    server = Probed(slots=2)
    made = server.made(1, scale=20.0)
    server.load("a", made)
    measured, probed = server.neutrality("a"), len(server.pieces)
    server.patch("a", threshold=1e6)
    server.work()
    server.patch("a", threshold=made.info.threshold)
    server.work()
    back = len(server.pieces)
    assert (back, server.neutrality("a")) == (2 * probed, measured)
    server.adapters.unload("a")
    server.load("again", dataclasses.replace(made))
    assert server.neutrality("again") == measured


def test_a_threshold_set_to_what_it_is_changes_nothing():
    server = Probed(slots=2)
    made = server.made(1)
    server.ask("beside", (), tokens=200)
    server.begin("a", made)
    registry = server.adapters.registry
    attached = registry.attachments.of((registry.get("a"),))
    server.patch("a", threshold=made.info.threshold, pinned=True)
    assert registry.attachments.of((registry.get("a"),)) == attached, "pages that it acted on can be used again"
    server.work()
    assert server.view("a").pinned
    assert sum(count for _, count in server.pieces) == sum(map(len, TEXTS.values())), "measured once"


def test_without_a_limit_an_adapter_acts_at_once_and_is_measured_meanwhile():
    server = Probed(slots=2)
    server.ask("beside", (), tokens=300)
    a, b = server.made(1), server.made(2)
    view = server.begin("a", a)
    # It acts from the second on: the first began without NaN.
    assert server.pieces == 2 * [("a", core_module.TRIAL_TOKENS_BESIDE)]
    assert (view.neutrality, view.measuring, view.state) == (None, True, "attached")
    for _ in range(5):
        server.step()
    server.begin("b", b)
    assert (server.view("a").measuring, server.neutrality("a")) == (True, None), "what waits to act goes first"
    server.ask("r", ("a", "b"))
    server.work()
    assert "beside" not in server.ended
    assert (server.neutrality("a"), server.neutrality("b")) == (leaks(a), leaks(b))
    assert not server.view("a").measuring
    server.finish()
    assert server.tokens["r"] == server.expected(a, b)


@pytest.mark.parametrize("how", ["unloaded", "replaced", "turned", "evicted"])
def test_what_acts_no_more_is_measured_no_further(how):
    server = Probed(slots=1 if how == "evicted" else 2)
    a, b = server.made(1), server.made(2)
    server.ask("beside", (), tokens=200)
    server.begin("a", a)
    if how == "unloaded":
        server.adapters.unload("a")
    elif how == "turned":
        server.patch("a", threshold=0.4).result(timeout=0)
    else:
        server.load("a" if how == "replaced" else "b", b, finish=False, replace=True)
    server.work()
    assert not server.ended
    counts = {name: sum(count for each, count in server.pieces if each == name) for name in "ab"}
    whole, begun = sum(map(len, TEXTS.values())), 2 * core_module.TRIAL_TOKENS_BESIDE
    assert (
        counts
        == {
            "unloaded": {"a": begun, "b": 0},
            "replaced": {"a": begun + whole, "b": 0},
            "turned": {"a": begun + whole, "b": 0},
            "evicted": {"a": begun, "b": whole},
        }[how]
    )
    if how == "turned":
        assert server.neutrality("a") == leaks(a, threshold=0.4)
    if how == "evicted":
        assert server.neutrality("a") is None
        server.ask("r", ("a",))
        server.finish()
        assert server.neutrality("a") == leaks(a), "in its turn"


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("pinned", [True, False])
def test_a_pin_turned_while_a_version_is_on_its_way_is_the_one_it_takes_over(pinned, asked):
    server = Probed(slots=2, max_leak=1.0)
    server.load("a", server.made(1), pinned=not pinned)
    answer = server.load("a", server.made(2), replace=True, pinned=asked, finish=False)
    server.step()
    server.patch("a", pinned=pinned)
    server.work()
    view = answer.result(timeout=0)
    assert (view.version, view.pinned) == ("v2", pinned if asked is None else asked)


def test_probing_is_not_counted():
    server = Probed(slots=3)
    server.load("b", server.made(2))
    server.load("c", server.made(3))
    server.ask("r", ("b",), selected="b")
    server.finish()
    before = server.core.statistics()
    made = server.made(1)
    server.load("a", made)
    server.patch("b", threshold=0.2)
    server.work()
    assert sum(count for name, count in server.pieces if name == "a") == sum(map(len, TEXTS.values()))
    after = server.core.statistics()
    for name in "bc":
        assert after.adapters[name].gates == before.adapters[name].gates
    assert set(after.adapters["a"].gates.seen) | set(after.adapters["a"].gates.fired) == {0}
    assert not after.adapters["a"].gates.fired_by_selected


def test_an_adapter_under_test_acts_on_nobody_and_is_not_observed():
    server = Probed(slots=2, max_leak=1.0)
    server.load("a", server.made(1), threshold=1e6)
    server.pieces.clear()
    answer = server.load("a", server.made(2), finish=False, replace=True)
    while not server.pieces:
        server.step()
    assert not answer.done()
    server.ask("none", (), selected="none")
    while "none" not in server.ended:
        server.step(copy=False)
    assert all(not view.gates.fired_by_selected for view in server.core.statistics().adapters.values())
    assert server.tokens["none"] == server.expected()


@pytest.mark.parametrize("slots", [1, 2])
def test_above_the_limit_a_load_is_refused_and_the_old_version_goes_on_serving(slots):
    base = tiny.model()
    good, bad = tiny.adapter(base, 1, threshold=0.7), tiny.adapter(base, 2)
    limit = worst(good)
    assert limit < worst(bad)
    server = Probed(slots=slots, max_leak=limit)
    server.load("a", good).result(timeout=0)  # exactly the limit is taken
    before = server.adapters.views()
    error = error_of(server.load("a", bad, replace=True))
    name = max(TEXTS, key=lambda text: leaks(bad)[text].rate)
    assert isinstance(error, BadRequest)
    for part in ("'a'", repr(name), f"{worst(bad):.3%}", f"{limit:.3%}", "--max-leak"):
        assert part in error.message
    server.work()
    after = server.adapters.views()
    assert [dataclasses.replace(v, slot=0) for v in after] == [dataclasses.replace(v, slot=0) for v in before]
    assert isinstance(error_of(server.load("new", bad)), BadRequest)
    assert server.load("mild", bad, threshold=1e6).result(timeout=0).name == "mild"
    server.adapters.unload("mild")
    server.work()
    assert server.answer("r", ("a",)) == server.expected(good)
    assert server.adapters.registry.slots_used == 1


def test_the_last_to_pin_is_the_last_to_act_behind_a_threshold_that_is_measured():
    server = Probed(slots=1, max_leak=1.0)
    server.load("a", server.made(1))
    server.work()
    first, second = server.patch("a", pinned=True, threshold=0.4), server.patch("a", pinned=False)
    server.work()
    assert [answer.result(timeout=0).pinned for answer in (first, second)] == [True, False]
    assert (server.view("a").pinned, server.view("a").threshold) == (False, 0.4)


def test_a_refused_load_gives_its_slot_back_to_whoever_had_it():
    server = Probed(slots=2, max_leak=0.0)
    for name in "abc":
        server.load(name, server.made(1), threshold=1e6)
    for name in "ac":
        server.ask(name, (name,))
        server.finish()
    # a was used least recently, so d gets its slot; b is newer than a, and would be next for a slot that is free.
    states = [server.state(name) for name in "abc"]
    assert states == ["attached", "registered", "attached"]
    assert isinstance(error_of(server.load("d", server.made(2))), BadRequest)
    server.work()
    assert [server.state(name) for name in "abc"] == states


def test_without_a_slot_an_adapter_is_measured_when_it_gets_one_and_then_not_again():
    server = Probed(slots=1)
    made = {name: server.made(i) for i, name in enumerate("ab")}
    server.load("a", made["a"], pinned=True)
    assert server.load("b", made["b"]).result(timeout=0).neutrality is None
    view = server.patch("b", threshold=0.1).result(timeout=0)
    assert (view.threshold, view.neutrality) == (0.1, None)
    server.patch("b", threshold=0.0)
    server.patch("a", pinned=False)
    server.pieces.clear()
    for name in "baba":
        server.ask(name, (name,))
        server.finish()
        assert server.tokens[name][-ANSWER:] == server.expected(made[name])
    assert {name for name, _ in server.pieces} == {"b"}
    assert sum(count for _, count in server.pieces) == sum(map(len, TEXTS.values()))
    assert server.neutrality("b") == leaks(made["b"])


def test_with_a_limit_nothing_is_taken_that_cannot_be_measured():
    server = Probed(slots=1, max_leak=1.0)
    server.load("a", server.made(1, threshold=0.2), pinned=True)
    before = server.adapters.views()
    assert isinstance(error_of(server.load("b", server.made(2))), Unavailable)
    assert isinstance(error_of(server.load("a", server.made(2), replace=True)), Unavailable)
    assert server.adapters.views() == before
    server.patch("a", pinned=False)
    server.load("b", server.made(2), pinned=True).result(timeout=0)
    assert isinstance(error_of(server.patch("a", threshold=0.1)), Unavailable)
    server.patch("b", pinned=False)
    answer = server.patch("a", threshold=0.1)
    server.work()
    assert answer.result(timeout=0).neutrality == leaks(server.made(1), threshold=0.1)
    assert server.state("a") == "attached"
    server.finish()


def test_with_a_limit_a_new_threshold_is_measured_before_it_acts():
    server = Probed(max_leak=1.0)
    made = server.made(1, carry=0.5)
    server.load("a", made)
    server.ask("before", ("a",))
    server.step()
    server.pieces.clear()
    answer = server.patch("a", threshold=0.4)
    for _ in range(3):
        server.step()
    assert server.pieces
    while "before" not in server.ended:
        assert not answer.done()
        server.step(copy=False)
    assert server.tokens["before"] == server.expected(made), "the old threshold acts until the new one is known"
    server.work()
    view = answer.result(timeout=0)
    assert (view.threshold, view.requests) == (0.4, 0)
    assert view.neutrality == leaks(made, threshold=0.4) != leaks(made)
    assert server.answer("after", ("a",)) == server.expected(server.made(1, carry=0.5, threshold=0.4))


def test_a_threshold_on_its_way_keeps_its_adapter_in_its_slot_and_is_no_request():
    server = Probed(slots=1, max_leak=1.0)
    server.load("a", server.made(1))
    answer = server.patch("a", threshold=0.4)
    server.step()
    assert server.view("a").requests == 0
    assert isinstance(error_of(server.load("b", server.made(2), finish=False)), Unavailable)
    server.ask("r", ("a",))
    server.step()
    assert not answer.done()
    assert [view.requests for view in server.adapters.views()] == [1]
    server.work()
    assert answer.result(timeout=0).threshold == 0.4
    server.finish()
    assert server.load("b", server.made(2)).result(timeout=0).state == "attached"


def test_a_threshold_above_the_limit_is_refused_and_nothing_turns():
    made = tiny.adapter(tiny.model(), 1)
    server = Probed(max_leak=worst(made, threshold=0.5))
    server.load("a", made, threshold=0.5)
    before = server.adapters.views()
    answer = server.patch("a", threshold=0.0, pinned=True)
    server.work()
    error = error_of(answer)
    assert isinstance(error, BadRequest)
    assert (error.param, "--max-leak" in error.message) == ("threshold", True)
    assert server.adapters.views() == before
    assert server.answer("r", ("a",)) == server.expected(server.made(1, threshold=0.5))


def test_the_last_threshold_asked_for_is_the_last_to_act():
    server = Probed(max_leak=1.0)
    made = server.made(1)
    server.load("a", made)
    answers = [server.patch("a", threshold=threshold) for threshold in (0.5, 0.2, 0.0)]
    server.work()
    assert [answer.result(timeout=0).threshold for answer in answers] == [0.5, 0.2, 0.0]
    assert server.neutrality("a") == leaks(made)
    assert server.view("a").threshold == 0.0
    server.finish()


@pytest.mark.parametrize("how", ["unloaded", "replaced"])
def test_an_adapter_that_goes_while_its_new_threshold_is_measured_gives_its_slot_back(how):
    server = Probed(slots=2, max_leak=1.0)
    server.load("a", server.made(1))
    answer = server.patch("a", threshold=0.5)
    server.step()
    if how == "unloaded":
        server.adapters.unload("a")
        assert isinstance(error_of(server.patch("a", threshold=0.5)), NotFound)
    else:
        loaded = server.load("a", server.made(2), replace=True, finish=False)
        late = server.patch("a", threshold=0.1)
    server.work()
    if how == "replaced":
        assert answer.result(timeout=0).threshold == 0.5
        assert loaded.result(timeout=0).version == "v2"
        assert isinstance(error_of(late), Conflict)
        assert server.neutrality("a") == leaks(server.made(2))
    else:
        assert isinstance(error_of(answer), Conflict)
    server.finish()
    assert server.adapters.registry.slots_used == (how == "replaced")
