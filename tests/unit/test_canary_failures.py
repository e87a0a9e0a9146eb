"""What goes wrong on a probe text: adapters gone wild, and steps that fail."""

import dataclasses

import pytest

from nr_serve.engine.core import MAX_FAILED_STEPS
from nr_serve.errors import BadAdapterFile, NotFound, NrError
from tests import tiny
from tests.unit.stepped import TEXTS, Probed, error_of


def with_failing(server, fails):
    """The server's runner, which fails where `fails` says so of pieces; gives what it was asked to run."""
    run, asked = server.runner.run, []

    def runs(pieces, labels):
        asked.append([piece.request.id if piece.trial is None else "trial" for piece in pieces])
        if fails(pieces):
            raise RuntimeError("out of memory")
        return run(pieces, labels)

    server.runner.run = runs
    return asked


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


def test_an_adapter_found_wild_as_it_gets_its_first_slot_never_acts(caplog):
    server = Probed(slots=1)
    server.load("a", server.made(1), pinned=True)
    wild = server.made(2, scale=1e38)
    server.load("wild", wild)
    assert server.state("wild") == "registered", "there was no slot to measure it in"
    server.ask("named", ("wild",))
    server.adapters.unload("a")
    states = set()
    while server.adapters.busy:
        server.step()
        states.add(server.state("wild"))
    assert states <= {"registered", "loading", None}
    assert server.adapters.views() == ()
    assert server.adapters.registry.slots_used == 0
    assert f"adapter wild, version {wild.version}: its residues drive the base" in caplog.text
    server.finish()
    assert isinstance(server.ended["named"], NotFound)


def test_what_an_adapter_found_wild_as_it_gets_a_slot_had_replaced_is_put_back():
    server = Probed(slots=1)
    server.load("a", server.made(1))
    server.load("b", server.made(3), pinned=True)
    wild = server.made(2, scale=1e38)
    server.load("a", wild, replace=True)
    assert server.view("a").version == wild.version
    server.patch("b", pinned=False)
    server.adapters.unload("b")
    server.work()
    assert (server.view("a").version, server.state("a")) == ("v1", "attached")
    assert server.answer("r", ("a",)) == server.expected(server.made(1))


def test_requests_that_run_again_without_a_probe_go_on_from_where_they_were():
    server = Probed()
    made = server.made(1, carry=0.9)
    server.load("a", made)
    server.ask("r", ("a",))
    server.step()
    server.load("b", server.made(2), finish=False)
    failed = []

    def fail_once(head, args):
        if not failed:
            failed.append(True)
            raise RuntimeError("behind the last layer")

    handle = server.base.lm_head.register_forward_pre_hook(fail_once)
    server.adapters.copy_some(seconds=60)
    server.finish()
    handle.remove()
    assert failed
    assert server.tokens["r"] == server.expected(made)


def test_a_probe_that_fails_is_a_load_refused_and_no_more():
    server = Probed()
    made = server.made(1)
    server.load("a", made)

    run = server.runner.run
    with_failing(server, lambda pieces: pieces[-1].trial is not None)
    server.ask("r", ("a",))
    error = error_of(server.load("a", server.made(2), replace=True))
    server.runner.run = run
    assert isinstance(error, NrError)
    assert "out of memory" not in error.message
    server.finish()
    assert server.tokens["r"] == server.expected(made)


@pytest.mark.parametrize("apart", [False, True])
def test_requests_that_fail_beside_a_probe_are_no_fault_of_the_adapter(apart):
    server = Probed()
    server.runner.tries_apart = apart
    failing = [True]
    asked = with_failing(server, lambda pieces: failing[0] and any(p.request.id == "r" for p in pieces))
    answer = server.load("a", server.made(1), finish=False)
    server.adapters.copy_some(seconds=60)
    server.ask("r", ())
    server.step()
    failing[0] = False
    assert asked == ([["r"], ["trial"]] if apart else [["r", "trial"], ["r"]])
    assert isinstance(server.ended["r"], NrError)
    server.work()
    assert answer.result(timeout=0).name == "a"


def test_a_probe_that_needs_a_pass_of_its_own_fails_alone():
    server = Probed()
    server.runner.tries_apart = True
    asked = with_failing(server, lambda pieces: pieces[-1].trial is not None)
    answer = server.load("a", server.made(1), finish=False)
    server.adapters.copy_some(seconds=60)
    server.ask("r", ())
    server.work()
    assert isinstance(error_of(answer), NrError)
    assert asked[0] == ["r"]
    server.finish()
    assert server.tokens["r"] == server.expected()


def test_steps_that_fail_now_and_then_beside_probes_do_not_end_the_engine():
    server = Probed()
    server.load("a", server.made(1))
    failing = [False]
    with_failing(server, lambda pieces: failing[0])
    for i in range(2 * MAX_FAILED_STEPS):
        server.load("a", server.made(i + 2), finish=False, replace=True)
        server.adapters.copy_some(seconds=60)
        failing[0] = False
        server.ask(f"well {i}", (), tokens=1)
        server.step()
        failing[0] = True
        server.ask(f"ill {i}", (), tokens=1)
        server.step()
    assert [server.ended[f"{how} {i}"] == "length" for i in range(3) for how in ("well", "ill")] == 3 * [
        True,
        False,
    ]
