"""Adapters come, go and change under running requests, and every request keeps what it was admitted with."""

import dataclasses
import random
from collections import Counter

import pytest

from nr_serve.engine.adapters.gate_counts import GateCounts
from nr_serve.engine.scheduler import MAX_OVERTAKEN
from nr_serve.errors import BadAdapterFile, BadRequest, Conflict, NotFound, Unavailable
from nr_serve.neutral import math
from tests import tiny
from tests.unit.stepped import ANSWER, PROMPT, Server, error_of


def test_a_load_is_published_only_when_all_of_it_is_copied():
    server = Server()
    a = server.made(1)
    answer = server.load("a", a, finish=False)
    for _ in range(tiny.LAYERS):
        assert not answer.done()
        assert server.state("a") is None
        server.adapters.copy_some(seconds=0)
    server.adapters.copy_some(seconds=0)
    view = answer.result(timeout=0)
    assert (view.name, view.state, view.version, view.h, view.nbytes) == ("a", "attached", "v1", a.h, a.nbytes)
    assert (view.domain, view.carry, view.threshold, view.pinned, view.requests) == ("test-1", 0.0, 0.0, False, 0)
    assert server.answer("r") == server.expected(a) != server.expected()
    assert server.adapters._bank.attached == {server.slot("a")}
    server.load("a", server.made(2), replace=True)
    assert server.adapters._bank.attached == {server.slot("a")}, "the one before it is shut"


def test_requests_keep_the_version_they_were_admitted_with_when_it_is_replaced():
    server = Server(slots=2)
    old, new = server.made(1), server.made(2, carry=0.5)
    server.load("a", old)
    server.ask("before", ("a",))
    for _ in range(3):
        server.step()
    answer = server.load("a", new, finish=False, replace=True)
    while not answer.done():
        server.step()
    server.ask("after", ("a",))
    assert server.adapters.registry.slots_used == 2
    assert server.view("a").requests == 1, "the old version's request counts"
    server.finish()
    assert server.tokens["before"] == server.expected(old)
    assert server.tokens["after"] == server.expected(new)
    assert server.expected(old) != server.expected(new)
    assert server.adapters.registry.slots_used == len(server.adapters._bank.attached) == 1
    assert answer.result().version == new.version


def test_a_request_keeps_an_adapter_that_is_unloaded_and_the_waiting_are_refused():
    server = Server(slots=1, budget=len(PROMPT))
    a = server.made(1)
    server.load("a", a)
    server.ask("running", ("a",))
    server.step()
    server.ask("waiting", ("a",))
    view = server.adapters.unload("a")
    assert view.state == "unloaded"
    assert view.gates.seen, "the view is of all that was counted, up to the end"
    assert server.adapters.views() == ()
    with pytest.raises(NotFound):
        server.adapters.check_selection(("a",))
    with pytest.raises(NotFound):
        server.adapters.unload("a")
    server.finish()
    assert server.tokens["running"] == server.expected(a)
    assert isinstance(server.ended["waiting"], NotFound)
    assert server.adapters.registry.slots_used == 0
    assert server.adapters._bank.attached == set(), "a slot nobody sits in is evaluated for nothing"
    assert server.answer("later") == server.expected()


def test_more_adapters_than_slots_are_attached_on_demand_for_exact_answers():
    server = Server(slots=2)
    made = {f"a{i}": server.made(i, carry=0.5 * (i % 2)) for i in range(5)}
    for name, each in made.items():
        server.load(name, each)
    states = [view.state for view in server.adapters.views()]
    assert states.count("attached") == 2
    assert states.count("registered") == 3
    asked = [("a0",), ("a3", "a1"), ("a2",), ("a4",), (), ("a0", "a4"), None, ("a1",), ("a2", "a3")]
    for i, names in enumerate(asked):
        server.ask(str(i), names)
    server.finish()
    for i, names in enumerate(asked):
        if names is not None:
            assert server.tokens[str(i)] == server.expected(*(made[n] for n in names)), names
    assert len({tuple(answer) for answer in server.tokens.values()}) > 5


def test_adapters_wanted_together_and_in_turn_are_copied_no_more_than_they_must():
    server = Server(slots=2)
    made = {name: server.made(i) for i, name in enumerate("abc")}
    for name, each in made.items():
        server.load(name, each)
    for name in ("a", "b"):
        server.ask(f"used {name}", (name,))
        server.finish()
    server.copies.clear()
    # a was used least recently, but it is wanted beside c: b must go.
    server.ask("a c", ("a", "c"))
    server.step()
    assert server.state("a") == "attached"
    # The next one must wait until c's slot can be taken; the last finds c attached still and goes before it.
    server.ask("a b", ("a", "b"))
    server.ask("c", ("c",))
    server.finish()
    assert server.copies == ["v2", "v1"]
    assert server.tokens["a c"] == server.expected(made["a"], made["c"])
    assert server.tokens["a b"] == server.expected(made["a"], made["b"])
    assert server.tokens["c"] == server.expected(made["c"])


@pytest.mark.parametrize(
    ("how", "attached"),
    [("unloaded", ["b", "c"]), ("replaced", ["a", "b"]), ("unloaded while a request holds it", ["b", "c"])],
)
def test_a_slot_that_comes_free_goes_to_the_newest_registered_adapter_unasked(how, attached):
    server = Server(slots=2)
    for i, name in enumerate("abc"):
        server.load(name, server.made(i), pinned=True)
    assert server.state("c") == "registered"
    if how == "unloaded":
        server.adapters.unload("a")
    elif how == "replaced":
        # No slot is left beside the pinned ones: the new version is published first, and gets the old one's.
        assert server.load("a", server.made(7), replace=True, finish=False).done()
    else:
        server.ask("r", ("a",))
        server.step()
        server.adapters.unload("a")
        assert server.state("c") == "registered"
        server.finish()
    server.adapters.copy_some(seconds=60)
    assert [v.name for v in server.adapters.views() if v.state == "attached"] == attached
    server.ask("all")
    server.finish()
    made = {"a": server.made(7), "b": server.made(1), "c": server.made(2)}
    assert server.tokens["all"] == server.expected(*(made[name] for name in attached))


def test_the_selection_of_the_base_name_is_what_is_attached_when_it_is_admitted():
    server = Server(slots=3)
    a, b = server.made(1), server.made(2)
    server.load("a", a)
    server.ask("one")
    server.step()
    server.load("b", b)
    server.ask("two")
    server.finish()
    assert server.tokens["one"] == server.expected(a)
    assert server.tokens["two"] == server.expected(a, b) != server.expected(a)


MANY = MAX_OVERTAKEN + 10


def ended_beside(server, running: str) -> set[str]:
    """Requests that end before one that runs does."""
    while running not in server.ended:
        server.step()
    return server.ended.keys() - {running}


@pytest.mark.parametrize("asked", ["the base's name", "an adapter that stays"])
def test_one_that_waits_for_a_slot_delays_no_request_that_can_do_without_it(asked):
    server = Server(slots=2)
    made = {name: server.made(i) for i, name in enumerate("abc")}
    server.load("a", made["a"])
    server.load("b", made["b"])
    server.ask("long", tokens=8 * ANSWER)
    server.step()
    server.ask("used last", ("b",), tokens=1)
    server.step()
    server.load("c", made["c"])
    server.ask("waits", ("c",))
    for i in range(MANY):
        server.ask(str(i), None if asked == "the base's name" else ("b",), tokens=1)
    server.step()
    _, *others = server.core.scheduler.running
    assert {v.name for each in others for v in each.selection} == {"b"}, "the slot of a is waited for"
    assert ended_beside(server, "long") == {"used last", *map(str, range(MANY))}
    server.finish()
    assert server.tokens["waits"] == server.expected(made["c"])
    assert server.answer("all") == server.expected(made["b"], made["c"])


def test_a_slot_that_is_waited_for_is_held_by_so_many_more_requests_that_name_its_adapter():
    server = Server(slots=1)
    server.load("a", server.made(1))
    server.ask("long", ("a",), tokens=8 * ANSWER)
    server.step()
    b = server.made(2)
    server.load("b", b)
    server.ask("waits", ("b",))
    for i in range(MANY):
        server.ask(str(i), ("a",), tokens=1)
    assert ended_beside(server, "long") == set(map(str, range(MAX_OVERTAKEN)))
    server.finish()
    assert server.tokens["waits"] == server.expected(b)


def test_a_replaced_version_that_still_runs_delays_the_next_one_and_nobody_else():
    server = Server(slots=1)
    new = server.made(2)
    server.load("a", server.made(1))
    server.ask("long", ("a",), tokens=8 * ANSWER)
    server.step()
    server.load("a", new, replace=True)
    server.ask("waits", ("a",))
    for i in range(MANY):
        server.ask(str(i), tokens=1)
    assert ended_beside(server, "long") == set(map(str, range(MANY)))
    server.finish()
    assert server.tokens["waits"] == server.expected(new)


@pytest.mark.parametrize("how", ["aborted", "its adapter unloaded", "pinned"])
def test_once_nobody_waits_for_its_slot_the_base_name_selects_an_adapter_again(how):
    server = Server(slots=1)
    a = server.made(1)
    server.load("a", a)
    server.ask("long", tokens=8 * ANSWER)
    server.step()
    server.load("b", server.made(2))
    server.ask("waits", ("b",))
    server.step()
    if how == "aborted":
        server.core.abort("waits")
    elif how == "pinned":
        server.patch("a", pinned=True)
    else:
        server.adapters.unload("b")
    server.step()
    server.ask("next")
    server.step()
    assert "long" not in server.ended
    server.finish()
    assert server.tokens["next"] == server.expected(a)


@pytest.mark.parametrize("case", ["name taken", "too wide", "threshold", "name taken meanwhile"])
def test_a_load_that_fails_changes_nothing(case):
    server = Server(slots=1)
    a, b = server.made(1), server.made(2)
    first = server.load("a", a, finish=case != "name taken meanwhile")
    if case == "name taken meanwhile":
        # Both were free to load when they began. The one slot is being written, so the second is published first.
        second = server.load("a", b)
        assert second.result(timeout=0).version == "v2"
        assert isinstance(error_of(first), Conflict)
        expected = server.expected(b)
    else:
        wide = server.made(3, h=17)
        options, adapter, kind = {
            "name taken": ({}, b, Conflict),
            "too wide": ({"replace": True}, wide, BadAdapterFile),
            "threshold": ({"replace": True, "threshold": 1e39}, b, BadRequest),
        }[case]
        before = server.adapters.views()
        assert isinstance(error_of(server.load("a", adapter, **options)), kind)
        assert server.adapters.views() == before
        expected = server.expected(a)
    assert not server.adapters.busy or case == "name taken meanwhile"
    assert server.answer("r", ("a",)) == expected
    assert server.adapters.registry.slots_used == 1


def test_a_file_with_a_threshold_no_float32_holds_is_refused_too():
    server = Server()
    a = server.made(1)
    wild = dataclasses.replace(a, info=dataclasses.replace(a.info, threshold=float("nan")))
    assert isinstance(error_of(server.load("a", wild)), BadRequest)
    assert server.adapters.views() == ()


def test_the_threshold_is_a_dial_that_acts_with_the_next_step():
    server = Server()
    server.load("a", server.made(1, threshold=0.2))
    server.load("b", server.made(2), threshold=0.7)
    assert [v.threshold for v in server.adapters.views()] == [0.2, 0.7]
    view = server.patch("a", threshold=0.5).result(timeout=0)
    assert (view.threshold, view.pinned) == (0.5, False)
    assert server.answer("half", ("a",)) == server.expected(server.made(1, threshold=0.5))
    server.patch("a", threshold=1e6)
    assert server.answer("shut", ("a",)) == server.expected()
    assert isinstance(error_of(server.patch("c", threshold=0.0)), NotFound)
    for threshold in (float("nan"), float("inf"), -0.1, 1e39):
        assert isinstance(error_of(server.patch("a", threshold=threshold)), BadRequest)
    assert server.view("a").threshold == 1e6


def test_what_is_not_routed_acts_where_it_is_named_alone_and_is_observed_everywhere():
    server = Server(slots=3)
    a, b = server.made(1), server.made(2)
    server.load("a", a)
    assert not server.load("b", b, routed=False).result(timeout=0).routed
    assert server.answer("to the base", None, selected="base") == server.expected(a)
    assert server.answer("by name", ("b",)) == server.expected(b)
    assert server.view("b").gates.fired_by_selected["base"] > 0, "it would have acted here"
    assert not server.load("b", b, replace=True).result(timeout=0).routed, "as the one that it replaces"
    assert server.answer("still", None) == server.expected(a)
    server.patch("b", routed=True)
    assert server.answer("both", None) == server.expected(a, b)


def test_a_dial_turned_while_the_weights_are_copied_is_not_lost():
    server = Server(slots=1)
    server.load("a", server.made(1))
    server.load("b", server.made(2))
    server.ask("r", ("b",) if server.slot("b") is None else ("a",))
    wanted = "b" if server.slot("b") is None else "a"
    server.step()
    assert server.state(wanted) == "loading"
    server.patch(wanted, threshold=1e6)
    server.finish()
    assert server.tokens["r"] == server.expected(), "the threshold shuts every gate"


def test_pinned_adapters_stay_and_a_selection_without_room_is_refused_at_once():
    server = Server(slots=2)
    made = {name: server.made(i) for i, name in enumerate("abc")}
    for name, each in made.items():
        server.load(name, each, pinned=name != "c")
    assert [server.state(name) for name in "abc"] == ["attached", "attached", "registered"]
    server.ask("c", ("c",))
    server.ask("behind", ("a",))
    server.finish()
    assert isinstance(server.ended["c"], Unavailable)
    assert server.tokens["behind"] == server.expected(made["a"]), "a request nobody can serve held up the others"
    server.patch("a", pinned=False)
    assert server.answer("c again", ("c",)) == server.expected(made["c"])
    assert [server.state(name) for name in "abc"] == ["registered", "attached", "attached"]
    with pytest.raises(BadRequest, match="at most 2"):
        server.adapters.check_selection(("a", "b", "c"))


@pytest.mark.parametrize("seed", range(2))
def test_random_loads_replacements_unloads_and_aborts_never_change_an_answer_under_way(seed):
    rng = random.Random(seed)
    server = Server(slots=3, budget=16)
    made = [server.made(i, carry=rng.choice([0.0, 0.5]), h=rng.choice([4, 16])) for i in range(6)]
    admitted = record_admissions(server)
    names, asked, loads = "abcde", 0, []
    for _ in range(160):
        roll, name = rng.random(), rng.choice(names)
        if roll < 0.15:
            loads.append(server.load(name, rng.choice(made), finish=False, replace=rng.random() < 0.7))
        elif roll < 0.20 and name in server.adapters.registry:
            server.adapters.unload(name)
        elif roll < 0.25 and name in server.adapters.registry:
            server.patch(name, pinned=rng.random() < 0.4)
        elif roll < 0.28 and asked:
            server.core.abort(str(rng.randrange(asked)))
        elif roll < 0.7:
            current = [view.name for view in server.adapters.views()]
            selection = rng.choice(
                [None, (), tuple(rng.sample(current, min(len(current), rng.choice([1, 1, 2, 3]))))]
            )
            server.ask(str(asked), selection)
            asked += 1
        server.step(copy=rng.random() < 0.8)
    server.finish()
    assert all(load.done() for load in loads)
    assert server.adapters.registry.slots_used <= 3
    checked = Counter()
    for key, why in server.ended.items():
        if why != "length":
            assert isinstance(why, NotFound | Unavailable)
            continue
        got = server.tokens[key]
        logits_TV = server.naive.logits([*PROMPT, *got], admitted[key])[len(PROMPT) - 1 : -1]
        assert got == logits_TV.argmax(-1).tolist()
        checked[len(admitted[key])] += 1
    assert min(checked[0], checked[1], checked[2] + checked[3]) > 5, checked


def record_admissions(server) -> dict[str, list]:
    """What each request was admitted with, filled in as it happens."""
    admitted = {}
    admit = server.core.scheduler._admit

    def recording(request, *, may_copy):
        if not admit(request, may_copy=may_copy):
            return False
        admitted.setdefault(request.id, [version.payload for version in request.selection])
        return True

    server.core.scheduler._admit = recording
    return admitted


def test_an_adapter_that_saw_nothing_yet_has_its_groups_of_layers():
    server = Server(slots=2)
    server.load("a", server.made(1))
    gates = server.view("a").gates
    assert gates.layer_groups == ("0-0", "1-1", "2-2")
    assert gates.fired == gates.seen == (0,) * tiny.LAYERS


def test_statistics_belong_to_names_survive_replacement_and_go_with_the_name():
    server = Server(slots=2)
    server.load("a", server.made(1))
    server.load("b", server.made(2))
    server.ask("1", ("a",), selected="hu")
    server.finish()
    first = server.core.statistics()
    fed = len(PROMPT) + ANSWER - 1
    assert first.adapters["a"].gates.layer_groups == ("0-0", "1-1", "2-2")
    assert first.adapters["a"].gates.seen == (fed,) * tiny.LAYERS
    assert first.adapters["b"].gates.seen == (0,) * tiny.LAYERS
    ids = [*PROMPT, *server.tokens["1"]][:-1]
    fired, mass = gates_by_the_definition(ids, server.made(1))
    assert first.adapters["a"].gates.fired == fired
    assert first.adapters["a"].gates.mass == pytest.approx(mass, rel=1e-4)
    assert first.adapters["a"].gates.fired_by_selected["hu"] == sum(first.adapters["a"].gates.fired)
    assert first.adapters["b"].gates.fired_by_selected["hu"] > 0, "b is observed on traffic that did not select it"
    assert (first.slots_used, first.slots_total) == (2, 2)

    server.load("a", server.made(3), replace=True)
    server.ask("2", ("a",), selected="hu")
    server.finish()
    second = server.core.statistics()
    assert second.adapters["a"].gates.seen == (2 * fed,) * tiny.LAYERS
    _, further = gates_by_the_definition([*PROMPT, *server.tokens["2"]][:-1], server.made(3))
    assert second.adapters["a"].gates.mass == pytest.approx(mass + further, rel=1e-4)

    server.adapters.unload("a")
    third = server.core.statistics()
    assert third.adapters.keys() == {"b"}
    server.load("a", server.made(3))
    assert server.core.statistics().adapters["a"].gates.mass == 0, "a new name starts at nothing"


def test_statistics_follow_an_adapter_from_slot_to_slot():
    server = Server(slots=1)
    for i in range(3):
        server.load(f"a{i}", server.made(i))
    fed = len(PROMPT) + ANSWER - 1
    for i in (0, 1, 0, 2, 0):
        server.ask(f"r{i}{server.core._arrivals}", (f"a{i}",))
    server.finish()
    statistics = server.core.statistics()
    assert [statistics.adapters[f"a{i}"].gates.seen[0] for i in range(3)] == [3 * fed, fed, fed]


@pytest.mark.parametrize("ends", ["once it is replaced", "while the next one is copied"])
def test_the_last_tokens_of_a_replaced_version_count_too(ends):
    server = Server(slots=2)
    server.load("a", server.made(1))
    server.ask("r", ("a",))
    server.step()
    server.load("a", server.made(2), replace=True, finish=ends == "once it is replaced")
    while "r" not in server.ended:
        server.step(copy=False)
    server.finish()
    assert server.core.statistics().adapters["a"].gates.seen == (len(PROMPT) + ANSWER - 1,) * tiny.LAYERS


def test_an_unloaded_adapter_that_still_runs_is_counted_no_more():
    server = Server(slots=2)
    server.load("a", server.made(1))
    server.load("b", server.made(2))
    server.ask("r", ("a",), selected="a")
    server.step()
    server.adapters.unload("a")
    server.finish()
    statistics = server.core.statistics()
    assert statistics.adapters.keys() == {"b"}
    assert "a" not in statistics.adapters["b"].gates.fired_by_selected
    server.load("a", server.made(1))
    assert set(server.core.statistics().adapters["a"].gates.seen) == {0}


@pytest.mark.parametrize("how", ["replaced", "unloaded"])
def test_the_traffic_of_the_base_name_stays_its_own_when_an_adapter_goes(how):
    server = Server(slots=2)
    server.load("a", server.made(1))
    server.load("b", server.made(2))
    asked = {"base": None, "a": ("a",)}
    for selected, names in asked.items():
        server.ask(selected, names, selected=selected)
    server.step()
    if how == "replaced":
        server.load("a", server.made(3), replace=True, finish=False)
    else:
        server.adapters.unload("a")
    assert server.core.scheduler.running[0].selection, "it holds what went"
    rows = server.adapters.labels(server.core.scheduler.running)
    row = server.adapters.registry.counts.row
    assert rows == [row("base"), row("other" if how == "unloaded" else "a")]
    server.finish()


def gates_by_the_definition(ids, adapter):
    """Gates that fired in each layer, and their sum, in the naive model's own forward pass."""
    fired, mass = [0] * tiny.LAYERS, 0.0
    naive = tiny.Naive(tiny.model())
    add = naive._add

    def counting(layer, x, y):
        block = adapter.blocks[layer]
        nonlocal mass
        g = math.block_gate(math.carry(math.gate_logit(x[0], block.gate, block.bias), adapter.info.carry))
        fired[layer] = int((g > 0).sum())
        mass += float(g.double().sum())
        return add(layer, x, y)

    for layer in naive.model.model.layers:
        layer.mlp.add_residues = counting
    naive.logits(ids, [adapter])
    return tuple(fired), mass


def test_beyond_a_bound_selections_share_one_row_and_an_unloaded_name_gives_its_row_back():
    server = Server()
    counts = GateCounts(server.adapters._bank, server.adapters.registry)
    rows = [counts.row(f"a+b{i}") for i in range(200)]
    assert len(set(rows)) == 61 + 1
    assert rows == [counts.row(f"a+b{i}") for i in range(200)]
    assert set(rows[61:]) == {counts.row("other")}
    own = [counts.row(f"s{i}") for i in range(100)]
    told = server.adapters._bank.slots + 2  # the base and the bare base are two more
    assert len(set(own[:told] + rows)) == told + len(set(rows)), "joined names leave rows to every slot's adapter"
    assert set(own[told:]) == {counts.row("other")}
    counts.forget("s1")
    assert counts.row("new") == own[1]
    assert counts.row("s1") == counts.row("other")
    counts.forget("other")
    assert counts.row("s1") == counts.row("other") == 0, "an adapter may be called other"


def test_gates_are_reported_for_every_token_with_adapters_and_without():
    server = Server(slots=2, budget=8)
    server.load("a", server.made(1))
    server.ask("some", ("a",), gates=True)
    server.finish()
    prompt = server.prompts["some"]
    assert [token.id for token in prompt] == list(PROMPT)
    shares = [token.gates["a"] for token in prompt]
    assert set(shares) <= {i / tiny.LAYERS for i in range(tiny.LAYERS + 1)}
    assert len(set(shares)) > 1
    # The prompt is read in chunks; in the middle of it the last adapter is unloaded, or the first one loaded.
    server.ask("unloaded", (), gates=True)
    server.step()
    server.adapters.unload("a")
    server.finish()
    server.ask("loaded", (), gates=True)
    server.step()
    server.load("b", server.made(2))
    server.finish()
    for name in ("unloaded", "loaded"):
        assert [dict(token.gates) for token in server.prompts[name]] == [{}] * len(PROMPT)
        assert server.tokens[name] == server.expected()
