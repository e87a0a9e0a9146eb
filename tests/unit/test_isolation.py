"""One request's trouble is its own: weights gone wild, sampling that fails, a step that fails."""

import dataclasses

import pytest
import torch

from nr_serve.engine.core import MAX_FAILED_STEPS
from nr_serve.engine.messages import Output, Sampling, Submit
from nr_serve.engine.model import results
from nr_serve.engine.request import Request
from nr_serve.errors import BadRequest
from tests import tiny
from tests.unit.stepped import engine, load


def ask(request_id: str, prompt, adapters=(), **sampling) -> Submit:
    return Submit(request_id, tuple(prompt), Sampling(**{"max_tokens": 8, "temperature": 0} | sampling), adapters)


def run(core) -> list[Output]:
    """All that its requests are given, until none is left."""
    outputs: list[Output] = []
    while not core.idle:
        outputs += core.step().outputs
    core.check()
    return outputs


def answers(core) -> dict[str, list[int]]:
    got: dict[str, list[int]] = {}
    for output in run(core):
        got.setdefault(output.request_id, []).extend(token.id for token in output.tokens)
    return got


def test_weights_gone_wild_do_not_touch_the_requests_beside_them():
    base = tiny.model()
    wild = tiny.adapter(base, seed=1, scale=1e38)
    core, adapters = engine(base, pages=40, budget=64, running=4, prefix_cache=False)
    load(adapters, "wild", wild)
    asked = [ask("wild", range(60), ("wild",)), ask("short", range(3)), ask("middle", range(7, 30))]
    core.add(asked[1])
    alone = answers(core)["short"]
    core.add(asked[2])
    alone_middle = answers(core)["middle"]
    for submit in asked:
        core.add(submit)
    together = answers(core)
    assert together["short"] == alone
    assert together["middle"] == alone_middle


def test_a_token_that_the_base_does_not_have_is_refused_before_it_shares_a_step():
    core, _ = engine(tiny.model(), pages=40, budget=64, running=4)
    core.add(ask("good", range(9)))
    alone = answers(core)["good"]
    core.add(ask("good", range(9)))
    refused = core.add(ask("bad", [3, tiny.VOCAB]))
    assert refused is not None
    assert isinstance(refused.error, BadRequest)
    assert answers(core) == {"good": alone}


@pytest.mark.parametrize("more", [{}, {"temperature": 1, "seed": 1}, {"prompt_logprobs": 1}])
def test_a_request_whose_logits_are_not_numbers_fails_alone(more):
    base = tiny.model()
    core, _ = engine(base, pages=40, budget=64, running=4, prefix_cache=False)
    good = ask("good", range(9))
    core.add(good)
    alone = answers(core)["good"]

    def to_nan(head, args, logits_TNV):
        logits_TNV[0, -1, 7] = torch.nan  # the last one's
        return logits_TNV

    core.add(good)
    core.add(ask("bad", range(20), **more))
    handle = base.lm_head.register_forward_hook(to_nan)
    first = core.step().outputs
    handle.remove()
    assert {output.request_id: output.finish_reason for output in first} == {"good": None, "bad": "error"}
    assert "not numbers" in next(output.error.message for output in first if output.error)
    assert [token.id for output in first for token in output.tokens] + answers(core)["good"] == alone


def test_a_request_that_cannot_be_sampled_fails_alone(monkeypatch):
    base = tiny.model()
    core, _ = engine(base, pages=40, budget=64, running=4, prefix_cache=False)
    sample = results.sample

    def sample_or_fail(logits, request):
        if request.id == "bad" and request.generated == 2:
            raise IndexError("out of the vocabulary")
        return sample(logits, request)

    monkeypatch.setattr(results, "sample", sample_or_fail)
    drawn = {"temperature": 1, "seed": 3, "ignore_eos": True}
    good = [ask("greedy", range(9)), ask("drawn", range(4, 20), **drawn)]
    alone = {}
    for submit in good:
        core.add(submit)
        alone |= answers(core)
    for submit in (ask("bad", range(5), **drawn), *good):
        core.add(submit)
    outputs = run(core)
    assert [o.error is not None for o in outputs if o.request_id == "bad"] == [False, False, True]
    for name, tokens in alone.items():
        assert [token.id for o in outputs if o.request_id == name for token in o.tokens] == tokens
        assert len(tokens) == 8


def test_an_answer_that_cannot_be_written_fails_alone(monkeypatch):
    core, _ = engine(tiny.model(), pages=40, budget=64, running=4)
    core.add(ask("good", range(9)))
    alone = answers(core)["good"]
    append = Request.append

    def append_or_fail(request, token):
        if request.id == "bad" and request.generated == 2:
            raise IndexError("the tokenizer does not know it")
        return append(request, token)

    monkeypatch.setattr(Request, "append", append_or_fail)
    for submit in (ask("bad", range(5)), ask("good", range(9))):
        core.add(submit)
    outputs = run(core)
    assert [o.error is not None for o in outputs if o.request_id == "bad"] == [False, False, True]
    assert [token.id for o in outputs if o.request_id == "good" for token in o.tokens] == alone


def test_steps_that_always_fail_end_the_engine(monkeypatch):
    core, _ = engine(tiny.model(), pages=40, budget=64, running=4)

    def lost(*_):
        raise RuntimeError("the device is gone")

    def fail(times: int) -> None:
        for _ in range(times):
            core.add(ask("r", range(5)))
            (output,) = core.step().outputs
            assert output.error is not None

    with monkeypatch.context() as patch:
        patch.setattr(core._runner, "run", lost)
        fail(MAX_FAILED_STEPS - 1)
    core.add(ask("r", range(5)))
    assert len(answers(core)["r"]) == 8, "one that works, and they are counted anew"
    monkeypatch.setattr(core._runner, "run", lost)
    fail(MAX_FAILED_STEPS - 1)
    core.add(ask("last", range(5)))
    with pytest.raises(RuntimeError, match="the device is gone"):
        core.step()


def test_an_id_that_is_in_use_is_refused_and_its_request_goes_on():
    core, _ = engine(tiny.model(), pages=40, budget=64, running=4)
    assert core.add(ask("r", range(5))) is None
    assert isinstance(core.add(ask("r", range(9))).error, BadRequest)
    assert len(answers(core)["r"]) == 8
    assert core.add(ask("r", range(9))) is None


def test_the_gauges_are_right_after_an_abort():
    core, _ = engine(tiny.model(), pages=40, budget=64, running=1)
    for name in ("running", "first in line", "second in line"):
        core.add(ask(name, range(30)))
    core.step()
    now = core.statistics()
    assert (now.running, now.waiting, now.pages_used) == (1, 2, 8), "of 4 tokens each"
    for name in ("running", "first in line", "second in line"):
        core.abort(name)
    now = core.statistics()
    assert dataclasses.astuple(now)[-4:] == (0, 0, 0, now.pages_total)


def test_requests_for_the_base_alone_overtake_one_that_waits_for_a_slot():
    base = tiny.model()
    core, adapters = engine(base, pages=60, budget=64, running=8, slots=1)
    load(adapters, "a", tiny.adapter(base, seed=1))
    core.add(ask("holds", range(5), ("a",), max_tokens=40))
    core.step()
    load(adapters, "b", tiny.adapter(base, seed=2), state="registered")
    core.add(ask("waits", range(5), ("b",)))
    core.add(ask("free", range(5)))
    finished = []
    while not core.idle:
        adapters.copy_some()
        finished += [o.request_id for o in core.step().outputs if o.finish_reason]
    assert finished == ["free", "holds", "waits"]


def test_wild_logits_are_what_the_first_test_needs():
    base = tiny.model()
    logits = tiny.Naive(base).logits(range(60), [tiny.adapter(base, seed=1, scale=1e38)])
    assert not torch.isfinite(logits).all()


def test_gates_of_any_size_keep_the_totals_finite():
    base = tiny.model()
    core, adapters = engine(base, pages=40, budget=64, running=4, prefix_cache=False)
    huge = tiny.adapter(base, seed=1, scale=0.0)
    blocks = tuple(
        dataclasses.replace(b, bias=torch.tensor(3e38), w_in=torch.zeros_like(b.w_in)) for b in huge.blocks
    )
    load(adapters, "huge", dataclasses.replace(huge, blocks=blocks))
    core.add(ask("r", range(9), ("huge",)))
    answers(core)
    gates = core.statistics().adapters["huge"].gates
    assert gates.fired == tuple(seen - 1 for seen in gates.seen), "all but the text's first token"
    assert min(gates.fired) > 0
    assert gates.mass == pytest.approx(3e38 * sum(gates.fired), rel=1e-3)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_gives_the_same_answer_again(seed):
    core, _ = engine(tiny.model(), pages=40, budget=64, running=4)
    drawn = []
    for _ in range(2):
        core.add(ask("r", range(9), temperature=2, seed=seed, ignore_eos=True))
        drawn.append(answers(core)["r"])
    assert drawn[0] == drawn[1]
