"""Greedy answers equal a naive loop, whatever is batched, chunked, preempted or selected beside them."""

import random

import pytest

from nr_serve.engine.messages import Sampling, Submit
from tests import tiny
from tests.unit.stepped import engine, load

REQUESTS = 300


@pytest.mark.parametrize("budget", [8, 13, 64])
def test_random_traffic_equals_the_naive_loop(budget):
    rng = random.Random(budget)
    base = tiny.model()
    naive = tiny.Naive(base)
    made = {
        "a0": tiny.adapter(base, seed=0),
        "a1": tiny.adapter(base, seed=1, carry=0.5),
        "a2": tiny.adapter(base, seed=2, carry=0.5, threshold=0.3, gate="relu1"),
        "a3": tiny.adapter(base, seed=3, bare_layers=(1,)),
    }
    core, adapters = engine(base, pages=24, budget=budget, running=8)
    for name, adapter in made.items():
        load(adapters, name, adapter)

    choices = [(), ("a0",), ("a1",), ("a1", "a2"), ("a0", "a1", "a3"), None]
    requests, answers = {}, {}
    for i in range(REQUESTS // 3):
        prompt = tuple(rng.randrange(290) for _ in range(rng.randint(1, 40)))
        sampling = Sampling(max_tokens=rng.randint(1, 20), temperature=0, logprobs=3, ignore_eos=True)
        requests[str(i)] = Submit(str(i), prompt, sampling, rng.choice(choices))
    queue, preempted = list(requests.values()), 0
    while queue or not core.idle:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if queue:
                assert core.add(queue.pop(0)) is None
        step = core.step()
        preempted += 0 if step.report is None else step.report.preemptions
        for output in step.outputs:
            assert output.error is None
            answers.setdefault(output.request_id, []).extend(output.tokens)
    core.check()
    assert preempted == core.scheduler.preemptions > 5

    changed = 0
    for key, request in requests.items():
        selected = list(made.values()) if request.adapters is None else [made[n] for n in request.adapters]
        got = [token.id for token in answers[key]]
        assert len(got) == request.sampling.max_tokens
        # The naive loop's answer: each token is the likeliest after the prompt and the answer so far. One
        # forward pass over the whole sequence checks them all, as no position sees what follows it.
        logprobs_TV = naive.logits([*request.prompt_ids, *got], selected).log_softmax(-1)[
            len(request.prompt_ids) - 1 :
        ]
        assert got == logprobs_TV.argmax(-1).tolist()[:-1], (key, request.adapters)
        for token, logprobs_V in zip(answers[key], logprobs_TV, strict=False):
            best = logprobs_V.topk(3)
            assert [i for i, *_ in token.top] == best.indices.tolist()
            assert [p for *_, p in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert token.logprob == pytest.approx(float(logprobs_V[token.id]), abs=1e-4)
        plain_TV = naive.logits([*request.prompt_ids, *got])[len(request.prompt_ids) - 1 :]
        changed += bool(selected) and got != plain_TV.argmax(-1).tolist()[:-1]
    assert changed > REQUESTS / 3 / 3, "the adapters of this test change too little to show a mistake"


def test_the_naive_loop_is_what_the_check_above_assumes():
    base = tiny.model()
    naive = tiny.Naive(base)
    adapters = [tiny.adapter(base, seed=1, carry=0.5), tiny.adapter(base, seed=2)]
    answer, _ = naive.greedy(range(20), 10, adapters)
    assert answer == naive.logits([*range(20), *answer], adapters)[19:-1].argmax(-1).tolist()


def test_a_prompt_that_is_preempted_half_way_is_told_of_as_a_whole():
    prompt, greedy = tuple(range(24)), {"temperature": 0, "ignore_eos": True}
    made, told = tiny.adapter(tiny.model(), seed=1), {}
    for pages in (40, 8):  # of eight, the first one's third is the second one's last
        core, adapters = engine(tiny.model(), pages=pages, budget=8, running=2)
        load(adapters, "a", made)
        core.add(Submit("first", tuple(range(50, 57)), Sampling(max_tokens=4, **greedy), ()))
        asked = Sampling(max_tokens=2, prompt_logprobs=0, **greedy)
        core.add(Submit("told", prompt, asked, ("a",), gates=True))
        while not core.idle:
            for output in core.step().outputs:
                assert output.error is None
                if output.request_id == "told":
                    told.setdefault(pages, []).append(output.prompt)
        assert core.scheduler.preemptions == (pages == 8)
    assert [told[pages].pop() for pages in (40, 8)] == [None, None], "it is told of once"
    told = {pages: prompt for pages, (prompt,) in told.items()}
    assert [token.gates for token in told[8]] == [token.gates for token in told[40]]
    assert {token.gates["a"] > 0 for token in told[8]} == {True, False}
    logprobs_TV = tiny.Naive(tiny.model()).logits(prompt, [made]).log_softmax(-1)
    for tokens in told.values():
        assert (tuple(token.id for token in tokens), tokens[0].logprob) == (prompt, None)
        expected = [float(logprobs_TV[at, token]) for at, token in enumerate(prompt[1:])]
        assert [token.logprob for token in tokens[1:]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("drawn", [{"temperature": 0}, {"temperature": 1, "seed": 3}])
def test_log_probabilities_of_the_prompt_do_not_change_the_answer(drawn):
    given = []
    for asked in ({}, {"prompt_logprobs": 1, "logprobs": 1}):
        core, _ = engine(tiny.model(), pages=40, budget=64, running=2)
        core.add(Submit("x", tuple(range(9)), Sampling(max_tokens=4, ignore_eos=True, **drawn, **asked), ()))
        tokens = []
        while not core.idle:
            for output in core.step().outputs:
                assert output.error is None
                tokens += [token.id for token in output.tokens]
        given.append(tokens)
    assert given[0] == given[1]
