"""Adapters are run past the probe texts, and what is reported is what the definition gives."""

import dataclasses
import logging
from pathlib import Path

import pytest

from nr_serve.config import PROBE_TOKENS
from nr_serve.engine import core as core_module
from nr_serve.engine.canary import Canary
from nr_serve.engine.messages import Leak
from nr_serve.engine.probe_text import BUILT_IN, probe_requests, read_probe_texts
from nr_serve.engine.scheduler import Result
from nr_serve.errors import BadAdapterFile, BadRequest, Conflict, NotFound, NrError, Unavailable
from nr_serve.neutral import math
from tests import tiny
from tests.unit.test_adapters import ANSWER, PROMPT, Server, error_of

TEXTS = {"one": list(range(10, 110)), "two": [7, 200, 31, 5] * 9, "three": list(range(290, 220, -1))}


class Probed(Server):
    """A tiny engine with a canary; every piece of probe text that it runs is noted."""

    def __init__(self, *, max_leak=None, **options) -> None:
        super().__init__(**options)
        self.pieces: list[tuple[str, int]] = []
        self.runner = self.core._runner
        self.run, self.runner.run = self.runner.run, self.watched
        requests = probe_requests(
            TEXTS, tiny.tokenizer(), longest=512, row=self.runner.probe_row, pages=self.runner.probe_pages
        )
        self.adapters._canary = Canary(requests, max_leak)

    def watched(self, pieces, labels):
        for piece in pieces:
            if piece.trial is not None:
                assert piece is pieces[-1]
                assert piece.count <= (core_module.TRIAL_TOKENS if len(pieces) == 1 else self.runner.trial_tokens)
                self.pieces.append((piece.request.selection[0].name, piece.count))
        return self.run(pieces, labels)

    def view(self, name):
        return self.adapters.view(self.adapters.registry.get(name))

    def neutrality(self, name):
        return self.view(name).neutrality

    def load(self, name, adapter, *, finish=True, **options):
        answer = super().load(name, adapter, finish=False, **options)
        if finish:
            self.work()
        return answer

    def work(self) -> None:
        """Copy and measure all there is."""
        while self.adapters.busy:
            self.step()


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
    monkeypatch.setattr(server.runner, "trial_tokens", piece_tokens)
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
    mass = pytest.approx(quiet.adapters["b"].mass)  # a sum is rounded by what shares its step
    assert loaded.adapters["b"] == dataclasses.replace(quiet.adapters["b"], mass=mass)
    assert quiet.adapters["b"].seen[0] == len(PROMPT) + ANSWER - 1
    assert {key: n for key, n in loaded.cross.items() if key[0] == "b"} == quiet.cross


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


def test_without_a_limit_an_adapter_acts_at_once_and_is_measured_meanwhile():
    server = Probed(slots=2)
    server.ask("beside", (), tokens=200)
    a, b = server.made(1), server.made(2)
    answer = server.load("a", a, finish=False)
    while not answer.done():
        server.step()
    # It acts from the second on: the first began without NaN.
    assert server.pieces == 2 * [("a", server.runner.trial_tokens)]
    assert (answer.result().neutrality, answer.result().measuring, server.state("a")) == (None, True, "attached")
    for _ in range(5):
        server.step()
    answer = server.load("b", b, finish=False)
    while not answer.done():
        server.step()
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
    answer = server.load("a", a, finish=False)
    while not answer.done():
        server.step()
    if how == "unloaded":
        server.adapters.unload("a")
    elif how == "turned":
        server.patch("a", threshold=0.4).result(timeout=0)
    else:
        server.load("a" if how == "replaced" else "b", b, finish=False, replace=True)
    server.work()
    assert not server.ended
    counts = {name: sum(count for each, count in server.pieces if each == name) for name in "ab"}
    whole, begun = sum(map(len, TEXTS.values())), 2 * server.runner.trial_tokens
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


def test_an_adapter_that_is_found_wild_while_it_acts_is_unloaded(caplog):
    server = Probed(slots=2)
    server.ask("beside", (), tokens=100)
    answer = server.load("a", server.made(1), finish=False)
    while not answer.done():
        server.step()
    server.ask("r", ("a",))
    server.step()
    run = server.runner.run

    def wild(pieces, labels):
        return [*run(pieces, labels)[:-1], Result(None, error=BadAdapterFile("not finite"))]

    server.runner.run = wild
    with caplog.at_level(logging.ERROR):
        assert server.step().adapters_changed
    server.runner.run = run
    assert not server.step().adapters_changed
    assert "adapter a, version v1: not finite" in caplog.text
    assert server.state("a") is None
    assert isinstance(error_of(server.patch("a", threshold=0.1)), NotFound)
    server.finish()
    assert server.tokens["r"] == server.expected(server.made(1)), "who holds it keeps it"
    assert server.adapters.registry.slots_used == 0


def replace_until_it_acts(server, seed):
    """Replace adapter a by another that begins well; its measurement goes on."""
    answer = server.load("a", server.made(seed), replace=True, finish=False)
    while not answer.done():
        server.step()
    assert server.view("a").measuring


def find_out(server):
    """The next piece of probe text turns to NaN."""
    run = server.runner.run
    server.runner.run = lambda pieces, labels: [
        *run(pieces, labels)[:-1], Result(None, error=BadAdapterFile("not finite"))
    ]  # fmt: skip
    server.step()
    server.runner.run = run


@pytest.mark.parametrize("slots", [1, 2])
def test_what_an_adapter_found_wild_had_replaced_is_put_back(slots):
    server = Probed(slots=slots)
    server.load("a", server.made(1), threshold=0.2, pinned=slots == 2)
    known = server.view("a")
    server.ask("beside", (), tokens=200)
    for seed in (2, 3):  # the second takes the place of one that is not measured yet
        replace_until_it_acts(server, seed)
    find_out(server)
    back = server.view("a")
    assert (back.version, back.threshold, back.pinned) == (known.version, known.threshold, known.pinned)
    assert (back.neutrality, back.measuring) == (known.neutrality, False), "its leak is known"
    while server.adapters.busy:
        server.step()
    assert server.state("a") == "attached"
    server.ask("r", ("a",))
    server.finish()
    assert server.tokens["r"] == server.expected(server.made(1, threshold=0.2))


def test_what_is_put_back_goes_before_others_that_wait_for_a_slot():
    server = Probed(slots=1)
    for name, seed in (("a", 1), ("b", 2)):
        server.load(name, server.made(seed))
    server.ask("beside", (), tokens=200)
    replace_until_it_acts(server, 3)
    assert server.state("b") == "registered"
    find_out(server)
    while server.adapters.busy:
        server.step()
    assert (server.view("a").version, server.state("a"), server.state("b")) == ("v1", "attached", "registered")


def test_a_threshold_found_wild_goes_back_to_the_last_that_was_measured():
    server = Probed(slots=2)
    made = server.made(1, threshold=0.2)
    server.load("a", made)
    known = server.view("a")
    server.patch("a", threshold=0.1)
    server.patch("a", threshold=0.0, pinned=True)
    find_out(server)
    back = server.view("a")
    assert (back.version, back.threshold, back.pinned) == (known.version, 0.2, True)
    server.work()
    assert (server.state("a"), server.neutrality("a")) == ("attached", known.neutrality)
    server.ask("r", ("a",))
    server.finish()
    assert server.tokens["r"] == server.expected(made)
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
    answer = server.load("a", server.made(2), threshold=0.3, replace=True, finish=False)
    while not answer.done():
        server.step()
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


def test_what_was_replaced_by_an_adapter_that_was_measured_does_not_come_back():
    server = Probed(slots=2)
    server.load("a", server.made(1))
    server.load("a", server.made(2), replace=True)
    server.ask("beside", (), tokens=200)
    replace_until_it_acts(server, 3)
    find_out(server)
    assert server.view("a").version == "v2"


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
    assert {name: after.adapters[name] for name in "bc"} == {name: before.adapters[name] for name in "bc"}
    assert set(after.adapters["a"].seen) | set(after.adapters["a"].fired) == {0}
    assert after.cross == before.cross


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
    assert server.core.statistics().cross == {}
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
    server.ask("r", ("a",))
    server.finish()
    assert server.tokens["r"] == server.expected(good)
    assert server.adapters.registry.slots_used == 1


def test_a_refused_load_gives_its_slot_back_to_whoever_had_it():
    server = Probed(slots=2, max_leak=0.0)
    for name in "abc":
        server.load(name, server.made(1), threshold=1e6)
    server.ask("r", ("a",))
    server.finish()
    # b was used least recently, so d gets its slot; c is newer than b, and would be next for a slot that is free.
    states = [server.state(name) for name in "abc"]
    assert states == ["attached", "attached", "registered"]
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
    server.ask("after", ("a",))
    server.finish()
    assert server.tokens["after"] == server.expected(server.made(1, carry=0.5, threshold=0.4))


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
    server.ask("r", ("a",))
    server.finish()
    assert server.tokens["r"] == server.expected(server.made(1, threshold=0.5))


def test_the_last_threshold_asked_for_is_the_last_to_act():
    server = Probed(max_leak=1.0)
    made = server.made(1)
    server.load("a", made)
    answers = [server.patch("a", threshold=threshold) for threshold in (0.5, 0.2, 0.0)]
    server.work()
    assert [answer.result(timeout=0).threshold for answer in answers] == [0.5, 0.2, 0.0]
    assert server.neutrality("a") == leaks(made)
    assert server.adapters.view(server.adapters.registry.get("a")).threshold == 0.0
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


def test_weights_gone_wild_are_refused_not_taken_for_neutral():
    server = Probed()
    assert isinstance(error_of(server.load("wild", server.made(1, scale=1e38))), BadAdapterFile)
    assert server.adapters.views() == ()
    assert server.adapters.registry.slots_used == 0


@pytest.mark.parametrize("max_leak", [None, 1.0])
@pytest.mark.parametrize("layer", range(tiny.LAYERS))
def test_one_block_gone_wild_is_refused_whatever_its_layer(layer, max_leak):
    server = Probed(max_leak=max_leak)
    made = server.made(1)
    blocks = list(made.blocks)
    blocks[layer] = dataclasses.replace(blocks[layer], w_out=blocks[layer].w_out * 1e38)
    error = error_of(server.load("wild", dataclasses.replace(made, blocks=tuple(blocks))))
    assert isinstance(error, BadAdapterFile)
    assert server.adapters.views() == ()


@pytest.mark.parametrize("max_leak", [None, 1.0])
def test_a_stream_too_large_to_be_normalised_is_refused_not_taken_for_neutral(max_leak):
    server = Probed(max_leak=max_leak)
    made = server.made(1, scale=1e24)  # finite, but not its square
    assert server.naive.logits(TEXTS["one"], [made]).isfinite().all()
    assert isinstance(error_of(server.load("wild", made)), BadAdapterFile)
    assert server.adapters.views() == ()


def test_a_probe_that_fails_is_a_load_refused_and_no_more():
    server = Probed()
    made = server.made(1)
    server.load("a", made)

    run = server.runner.run

    def fails(pieces, labels):
        if pieces[-1].trial is not None:
            raise RuntimeError("out of memory")
        return run(pieces, labels)

    server.runner.run = fails
    server.ask("r", ("a",))
    error = error_of(server.load("a", server.made(2), replace=True))
    server.runner.run = run
    assert isinstance(error, NrError)
    assert "out of memory" not in error.message
    server.finish()
    assert server.tokens["r"] == server.expected(made)


def test_the_probe_texts_are_plain_english_of_several_kinds():
    texts = read_probe_texts([], tiny.tokenizer())
    assert set(texts) == {"prose", "questions", "documentation", "code", "chat"}
    for path in BUILT_IN:
        assert 200 < len(path.read_text(encoding="ascii")) < 2000
    assert tiny.tokenizer().decode(texts["chat"]).startswith("<user>Hi!"), "the base's own template"
    bare = tiny.tokenizer()
    bare.hf.chat_template = None
    assert bare.decode(read_probe_texts([], bare)["chat"]).startswith("Hi!")


def test_files_replace_the_texts_and_long_ones_are_cut(tmp_path):
    (tmp_path / "law.txt").write_text("The court. " * 20_000)
    (tmp_path / "chat.txt").write_text("Hello.")
    texts = read_probe_texts([tmp_path / "law.txt", tmp_path / "chat.txt"], tiny.tokenizer())
    assert tiny.tokenizer().decode(texts["chat"]) == "Hello.", "a file is taken as it is"
    made = probe_requests(texts, tiny.tokenizer(), longest=10_000, row=0, pages=range(4))
    assert {name: request.prompt_length for name, request in made.items()} == {"law": PROBE_TOKENS, "chat": 6}
    made = probe_requests(texts, tiny.tokenizer(), longest=5, row=0, pages=range(4))
    assert {request.prompt_length for request in made.values()} == {5}


@pytest.mark.parametrize("case", ["missing", "empty", "no text", "two of a name"])
def test_a_wrong_probe_text_is_said(tmp_path, case):
    path = tmp_path / "law.txt"
    if case != "missing":
        path.write_bytes({"empty": b" \n", "no text": b"\xff\xfe"}.get(case, b"The court."))
    files = [path, Path(path)] if case == "two of a name" else [path]
    with pytest.raises(BadRequest, match="law"):
        read_probe_texts(files, tiny.tokenizer())
