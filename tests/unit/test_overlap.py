"""Outputs are written while a GPU computes the next step: none is lost, late for ever, or of another's."""

import random

import pytest

from nr_serve.engine.messages import Sampling, Submit
from nr_serve.errors import NrError
from tests import tiny
from tests.unit.stepped import Device, engine, load


def made(*, overlaps=True, **options):
    base = tiny.model()
    core, adapters = engine(base, **{"pages": 40, "budget": 24, "running": 4} | options)
    for seed, name in enumerate("ab"):
        load(adapters, name, tiny.adapter(base, seed=seed))
    if overlaps:
        core._runner = Device(core._runner)
    return core


def ask(name, prompt=range(9), adapters=(), gates=False, **sampling) -> Submit:
    sampling = {"max_tokens": 8, "temperature": 0, "ignore_eos": True} | sampling
    return Submit(name, tuple(prompt), Sampling(**sampling), adapters, gates=gates)


def advance(core) -> tuple[list, list]:
    """One round of the engine's loop: outputs handed over while the step runs, and after it."""
    step = core.launch()
    return list(core.write().outputs), list(core.finish(step).outputs)


def run(core) -> dict[str, list]:
    got: dict[str, list] = {}
    while not core.idle:
        during, after = advance(core)
        for output in during + after:
            got.setdefault(output.request_id, []).append(output)
    core.check()
    return got


def told(outputs) -> tuple:
    """All that a client is told, whichever step told it."""
    text, tokens = "".join(o.text for o in outputs), [t for o in outputs for t in o.tokens]
    assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
    last = outputs[-1]
    return text, tokens, [o.prompt for o in outputs if o.prompt], last.finish_reason, last.stop_reason, last.error


def traffic(seed: int) -> list[Submit]:
    rng = random.Random(seed)
    asked = []
    for i in range(24):
        sampling = {"max_tokens": rng.randint(0, 12), "ignore_eos": rng.random() < 0.8}
        stops = [chr(rng.randrange(33, 126)) for _ in range(30)]
        sampling |= rng.choice(
            [{}, {"stop": tuple(stops)}, {"stop": ("zz",)}, {"stop_token_ids": tuple(range(100))}]
        )
        sampling |= rng.choice([{}, {"temperature": 1.0, "seed": i}, {"logprobs": 2}, {"min_tokens": 3}])
        sampling |= {"prompt_logprobs": 1} if rng.random() < 0.2 or not sampling["max_tokens"] else {}
        if sampling.get("min_tokens", 0) > sampling["max_tokens"]:
            del sampling["min_tokens"]
        prompt = [rng.randrange(tiny.VOCAB - 10) for _ in range(rng.randint(1, 30))]
        asked.append(ask(f"r{i}", prompt, rng.choice([(), ("a",), ("a", "b")]), rng.random() < 0.2, **sampling))
    return asked


@pytest.mark.parametrize("seed", range(3))
def test_clients_are_told_the_same(seed):
    given = []
    for overlaps in (True, False):
        core = made(overlaps=overlaps, pages=20)
        for submit in traffic(seed):
            assert core.add(submit) is None
        given.append({name: told(outputs) for name, outputs in run(core).items()})
        assert core.scheduler.preemptions > 0
    assert given[0] == given[1]
    assert {reason for *_, reason, _, _ in given[0].values()} == {"stop", "length"}
    assert len({text for text, *_ in given[0].values()}) > 12


def test_outputs_are_written_while_the_next_step_runs():
    core = made()
    core.add(ask("r", max_tokens=3))
    step = core.launch()
    assert core._runner.under_way
    assert core.write().outputs == core.finish(step).outputs == ()
    step = core.launch()
    (output,) = core.write().outputs
    assert core._runner.under_way, "the text was made before the step's results were waited for"
    assert len(output.tokens) == 1
    core.finish(step)
    advance(core)
    assert not core._requests
    assert not core.idle, "the last token is still to be written"
    during, after = advance(core)
    assert ([o.finish_reason for o in during], after) == (["length"], [])
    assert core.idle


def test_a_step_by_hand_keeps_nothing_back():
    core = made()
    core.add(ask("r", max_tokens=2))
    assert [len(core.step().outputs) for _ in range(2)] == [1, 1]
    assert core.idle


def test_nothing_is_written_for_who_has_gone():
    core = made()
    core.add(ask("gone"))
    core.add(ask("ended", max_tokens=1))
    core.add(ask("stays"))
    advance(core)
    core.abort("gone")
    core.abort("ended")
    core.add(ask("gone", max_tokens=1))  # another one of that name
    got = run(core)
    assert set(got) == {"gone", "stays"}
    assert len(got["gone"]) == 1
    assert len(got["stays"]) == 8


def test_what_cannot_be_written_fails_alone_though_it_runs(monkeypatch):
    core = made()
    for name in ("bad", "bad at its end", "good"):
        core.add(ask(name, max_tokens=1 if name == "bad at its end" else 8))
    advance(core)
    for each in core._unwritten:
        if each.request.id.startswith("bad"):
            monkeypatch.setattr(each.request.text._detokenizer, "push", lambda _: 1 / 0)
    got = run(core)
    assert {name: outputs[-1].finish_reason for name, outputs in got.items()} == {
        "bad": "error",
        "bad at its end": "error",
        "good": "length",
    }
    assert [len(outputs) for outputs in got.values()] == [1, 1, 8]
    assert "could not be written" in got["bad"][0].error.message


def test_a_step_that_cannot_be_launched_fails_its_requests_alone(monkeypatch):
    core = made()
    core.add(ask("before", max_tokens=1))
    advance(core)
    core.add(ask("fails"))

    def lost(*_):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(core._runner, "launch", lost)
        during, after = advance(core)
    assert [(o.request_id, o.finish_reason) for o in during] == [("before", "length")]
    assert [(o.request_id, o.finish_reason) for o in after] == [("fails", "error")]
    core.add(ask("later"))
    assert len(run(core)["later"]) == 8


def test_whoever_had_an_answer_gets_it_when_the_engine_ends():
    core = made()
    core.add(ask("ended", max_tokens=1))
    core.add(ask("open"))
    advance(core)
    outputs = core.abort_all(NrError("the server stopped")).outputs
    assert [(o.request_id, o.finish_reason) for o in outputs] == [
        ("ended", "length"),
        ("open", None),
        ("open", "error"),
    ]
    assert core.idle
