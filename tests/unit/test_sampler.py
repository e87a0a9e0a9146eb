"""Sampling against transformers' own processors, OpenAI's formulas, float64, and the law of large numbers."""

import math
import random

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nr_serve.engine.messages import Sampling, Submit
from nr_serve.engine.model.sampler import (
    _token_at,
    adjust,
    likeliest,
    log_probabilities,
    sample,
    takes_likeliest,
    weights,
)
from nr_serve.engine.request import AnswerText, Request
from nr_serve.tokenizer import Detokenizer
from tests import tiny

VOCAB, LARGE = 40, 5000  # the large one is summed in parts, and sorted in parts
NAN, INF = float("nan"), float("inf")


def request(prompt=(1,), answer=(), *, seed=0, eos=(), **sampling) -> Request:
    made = Request(
        submit=Submit("r", tuple(prompt), Sampling(**sampling)),
        eos_ids=frozenset(eos),
        seed=seed,
        text=AnswerText(Detokenizer(tiny.tokenizer(), ()), ()),
        arrival=0,
    )
    made.tokens += answer
    return made


def logits(seed: int, size: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def chi_square(counts, expected) -> float:
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


# Against transformers


@pytest.mark.parametrize("size", [VOCAB, LARGE])
@pytest.mark.parametrize("seed", range(60))
def test_temperature_top_k_top_p_and_min_p_are_those_of_transformers(seed, size):
    rng = random.Random(seed)
    sampling = Sampling(
        temperature=rng.choice([0.3, 1.0, 1.7]),
        top_k=rng.choice([0, 1, 2, 7, VOCAB - 1, VOCAB, 3000, 10_000]),
        top_p=rng.choice([1.0, 0.95, 0.5, 0.1, 1e-6]),
        min_p=rng.choice([0.0, 0.01, 0.3, 1.0]),
    )
    theirs = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        theirs.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        theirs.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        theirs.append(MinPLogitsWarper(sampling.min_p))
    raw = logits(seed, size) if seed % 2 else logits(seed, size) / 9  # some need thousands of tokens for top_p
    want = theirs(torch.tensor([[0]]), raw[None].clone())[0]
    got = torch.from_numpy(weights(raw.numpy(), sampling))
    assert torch.equal(got == 0, want.isneginf()), sampling
    assert got.max() == 1
    torch.testing.assert_close(got / got.sum(), want.softmax(-1))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_p": 0.5}, 1),  # they reach it
        ({"top_p": 0.5 + 1e-6}, 2),
        ({"top_p": 0.75}, 2),
        ({"top_p": 0.875}, 4),  # the third and the fourth are as likely
        ({"min_p": 0.5}, 2),  # no less than half of the likeliest
        ({"min_p": 0.5 + 1e-6}, 1),
        ({"min_p": 0.25}, 4),
        ({"min_p": 1.0}, 1),
    ],
)
def test_top_p_keeps_until_it_is_reached_and_min_p_what_is_no_less_likely(options, kept):
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert torch.equal(probabilities.log().softmax(-1), probabilities)
    assert (weights(probabilities.log().numpy(), Sampling(**options)) > 0).tolist() == [i < kept for i in range(4)]


def test_a_top_p_of_1_and_a_min_p_of_0_leave_out_nothing():
    raw = torch.tensor([0.0, 0.0, 0.0, -30.0])
    assert raw.softmax(-1)[:3].double().sum() > 1, "rounded up"
    assert (weights(raw.numpy(), Sampling(top_p=1.0, min_p=0.0)) > 0).all()


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_the_repetition_penalty_is_that_of_transformers_over_prompt_and_answer(penalty):
    made = request([3, 5, 5, 9], [7, 3], repetition_penalty=penalty)
    want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([made.tokens]), logits(1)[None].clone())[0]
    assert (logits(1)[made.tokens] > 0).any()
    assert (logits(1)[made.tokens] < 0).any()
    torch.testing.assert_close(adjust(logits(1), made), want)


def test_presence_and_frequency_penalties_count_the_answer_alone():
    answer = [4, 4, 4, 8, 0]
    got = adjust(logits(2), request([9, 9, 4], answer, presence_penalty=0.7, frequency_penalty=-0.25))
    want = [x - 0.7 * (i in answer) + 0.25 * answer.count(i) for i, x in enumerate(logits(2).tolist())]
    assert got.tolist() == pytest.approx(want, abs=1e-6)
    untouched = adjust(logits(2), request([9, 9, 4], presence_penalty=0.7, frequency_penalty=-0.25))
    assert torch.equal(untouched, logits(2))


def test_the_logit_bias_is_added():
    got = adjust(logits(3), request(logit_bias={0: 1.5, 39: -100.0}))
    want = logits(3)
    want[0] += 1.5
    want[39] -= 100
    assert torch.equal(got, want)
    assert sample(logits(3), request(logit_bias={17: 100.0}, temperature=0)) == 17


def test_before_min_tokens_no_token_that_ends_the_answer_is_chosen():
    settings = {"min_tokens": 2, "eos": (5, 6), "stop_token_ids": (7,)}
    for answer, forbidden in (([], {5, 6, 7}), ([1], {5, 6, 7}), ([1, 1], set())):
        got = adjust(logits(4), request(answer=answer, **settings))
        assert set(got.isneginf().nonzero().flatten().tolist()) == forbidden
    high = logits(4)
    high[5] = 100
    for seed in range(20):
        assert sample(high, request(seed=seed, **settings)) not in (5, 6, 7)
        assert sample(high, request(seed=seed, answer=[1, 1], **settings)) == 5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 2.0},
        {"presence_penalty": 1.0},
        {"logit_bias": {1: 1.0}},
        {"min_tokens": 9, "eos": (2,)},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
    ],
)
def test_the_models_logits_are_not_changed(options):
    given = logits(5)
    sample(given, request([1, 2], [1], **options))
    assert torch.equal(given, logits(5))


# The draw


def test_at_temperature_0_the_likeliest_is_chosen_after_penalties():
    raw = logits(6)
    best, second = raw.topk(2).indices.tolist()
    assert sample(raw, request(temperature=0)) == best
    assert sample(raw, request(temperature=0, logit_bias={best: -100.0})) == second
    assert sample(raw, request(top_p=0.0)) == best, "the likeliest always stays"


@pytest.mark.parametrize("temperature", [1e-4, 1e-12, 1e-40, 1e-46, 5e-324])
def test_the_smallest_temperatures_choose_the_likeliest_too(temperature):
    for seed in range(10):
        assert sample(logits(seed), request(temperature=temperature, seed=seed)) == int(logits(seed).argmax())


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {5: 9.0}},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 3.0},
        {"min_tokens": 3, "stop_token_ids": (7,)},
        {"temperature": 1.0, "top_k": 1, "logit_bias": {5: 9.0}},
    ],
)
def test_the_likeliest_is_taken_unasked_only_where_sampling_gives_it(options):
    raw = torch.zeros(VOCAB)
    raw[7], raw[5] = 4.0, 3.0
    asked = request(prompt=(1, 2), answer=[7], **({"temperature": 0} | options))
    assert sample(raw, asked) == 5 != likeliest(raw[None]).item()
    assert not takes_likeliest(asked)
    plain = request(prompt=(1, 2), answer=[7], temperature=0)
    assert takes_likeliest(plain)
    assert likeliest(torch.stack([raw, -raw, raw.roll(1)])).tolist() == [sample(raw, plain), 0, 8]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.7}, {"top_p": 0.8, "temperature": 0.7}, {"top_k": 5}])
def test_frequencies_follow_the_probabilities(options):
    draws, raw = 2000, logits(7, size=12) / 2
    drawn_from = weights(raw.numpy(), Sampling(**options)).astype(float)
    probabilities = (drawn_from / drawn_from.sum()).tolist()
    # Half of the draws by seed, half by place in the answer: both must be independent.
    got = [sample(raw, request(seed=s, **options)) for s in range(draws // 2)]
    got += [sample(raw, request(seed=-1, answer=[0] * place, **options)) for place in range(draws // 2)]
    kept = [i for i, p in enumerate(probabilities) if p > 0]
    assert set(got) <= set(kept)
    statistic = chi_square([got.count(i) for i in kept], [draws * probabilities[i] for i in kept])
    assert statistic < 33, "beyond the 0.999 quantile of chi-square with 11 degrees of freedom (31.3)"


def test_frequencies_follow_the_probabilities_in_a_large_vocabulary_too():
    raw, draws = logits(8, size=LARGE) / 2, 3000
    got = torch.tensor([sample(raw, request(seed=s)) for s in range(draws)])
    of_part = torch.arange(LARGE) % 7 + 7 * (torch.arange(LARGE) // 1000)  # all parts of it, and all places in them
    expected = torch.zeros(35).double().index_add_(0, of_part, draws * raw.double().softmax(-1))
    counts = of_part[got].bincount(minlength=35)
    assert chi_square(counts.tolist(), expected.tolist()) < 66, "0.999 quantile with 34: 65.2"


@pytest.mark.parametrize("gap", [1, 256, 700])
def test_a_token_of_weight_0_is_never_drawn(gap):
    zeros = np.zeros(gap, np.float32)
    own = [0.5, 1.0, 0.25, 1e-30]
    laid = np.concatenate([zeros, *(np.append(zeros, np.float32(weight)) for weight in own), zeros])
    ends = np.cumsum(own) / sum(own)
    for share in (0.0, *ends[:-1], *np.nextafter(ends[:-1], 0), 1 - 2**-53):
        assert laid[_token_at(laid, share)] > 0, share
    assert [_token_at(laid, share) for share in (0.1, 0.5, 0.99)] == [2 * gap, 3 * gap + 1, 4 * gap + 2]


def test_of_logits_gone_wild_the_infinite_is_drawn_and_the_impossible_is_not():
    for seed in range(20):
        for value, drawn in ((INF, {3}), (-INF, set(range(VOCAB)) - {3})):
            raw = logits(8)
            raw[3] = value
            for options in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
                assert sample(raw, request(seed=seed, **options)) in drawn


def test_draws_at_neighbouring_places_are_independent():
    raw = torch.tensor([1.0, 0.5, 0.0])
    p = raw.double().softmax(-1)
    got = [sample(raw, request(seed=3, answer=[0] * place)) for place in range(2000)]
    pairs = [a * 3 + b for a, b in zip(got[::2], got[1::2], strict=True)]
    expected = (1000 * torch.outer(p, p)).flatten().tolist()
    assert chi_square([pairs.count(i) for i in range(9)], expected) < 28, "0.999 quantile with 8: 26.1"


def test_the_same_seed_and_place_give_the_same_token():
    def answer(seed):
        made = request(seed=seed)
        for place in range(40):
            made.tokens.append(sample(logits(place), made))
        return made.tokens

    torch.manual_seed(1)
    first = answer(5)
    torch.manual_seed(2)
    assert answer(5) == first, "torch's own generator had a say"
    assert answer(6) != first
    assert answer(-5) != first
    assert answer(2**63 - 1) != answer(2**63 - 2)


def test_an_answer_is_not_that_of_the_next_seed_a_token_later():
    def draws(seed, places):
        return [sample(logits(0) / 9, request(seed=seed, answer=[0] * place)) for place in places]

    assert len(set(draws(5, range(1, 30)))) > 5
    for step in (-1, 1):
        assert draws(5, range(1, 30)) != draws(5 + step, range(1 - step, 30 - step))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("everywhere", [True, False])
def test_logits_gone_wild_give_a_token_and_numbers(value, everywhere):
    raw = logits(8)
    raw[... if everywhere else 3] = value
    for options in (
        {},
        {"temperature": 0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"repetition_penalty": 2.0, "presence_penalty": 1.0},
    ):
        assert 0 <= sample(raw, request(answer=[3], **options)) < VOCAB
    for logprob, top in log_probabilities(raw[None], [3], 5):
        assert all(math.isfinite(p) for p in (logprob, *(p for _, p in top)))
        assert value == INF or logprob == -9999


# Reports


def test_log_probabilities_are_those_of_float64():
    rows = torch.stack([logits(9), 30 * logits(10), logits(11) - 1000])
    ids = [4, int(rows[1].argmin()), 0]
    got = log_probabilities(rows, ids, 5)
    want_NV = rows.double().log_softmax(-1)
    for (logprob, top), token_id, want_V in zip(got, ids, want_NV, strict=True):
        assert logprob == pytest.approx(float(want_V[token_id]), abs=1e-4)
        best = want_V.topk(5)
        assert [i for i, _ in top] == best.indices.tolist()
        assert [p for _, p in top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [top for _, top in log_probabilities(rows, ids, 0)] == [(), (), ()]
    assert [p for p, _ in log_probabilities(rows, ids, 0)] == [p for p, _ in got]
    assert len(log_probabilities(rows, ids, VOCAB)[0][1]) == VOCAB


def test_a_token_that_cannot_be_has_a_log_probability_that_json_can_carry():
    raw = logits(12)
    raw[3] = -INF
    assert log_probabilities(raw[None], [3], 0) == [(-9999.0, ())]
