"""Drawing for many requests at once, on a CUDA device or through Triton's interpreter, against `sampler.py`."""

import random

import pytest
import torch

pytest.importorskip("triton")

from nr_serve.engine.model.device import _as_block
from nr_serve.engine.model.gpu_sampler import draw
from nr_serve.engine.model.sampler import NOT_A_NUMBER, likeliest, sample, weights
from tests.unit.test_sampler import VOCAB, chi_square, logits, request

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drawn(logits_NV, requests):
    rows, tokens_n = draw(logits_NV.to(DEVICE), dict(enumerate(requests)))
    return dict(zip(rows, tokens_n.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(2))
def test_draws_follow_the_distribution_after_temperature_top_k_top_p_and_min_p(seed):
    rng, count = random.Random(seed), 300
    options = {
        "temperature": rng.choice([0.7, 1.0, 1.7]),
        "top_k": rng.choice([0, 5, 1000]),
        "top_p": rng.choice([1.0, 0.9, 0.5]),
        "min_p": rng.choice([0.0, 0.02]),
    }
    logits_V = logits(seed)
    requests = [request(seed=i, **options) for i in range(count)]
    got = drawn(logits_V.expand(count, -1), requests)
    want_V = torch.from_numpy(weights(logits_V.numpy(), requests[0].sampling))
    want_V /= want_V.sum()
    counts_V = torch.tensor(list(got.values())).bincount(minlength=VOCAB)
    assert not counts_V[want_V == 0].any()
    likely = want_V * count > 5
    expected = (want_V[likely] * count).tolist()
    assert chi_square(counts_V[likely].tolist(), expected) < 2 * len(expected) + 15


def test_a_draw_depends_on_the_seed_and_the_place_alone_not_on_who_shares_the_step():
    logits_V = logits(1)
    alike = [request(seed=5, temperature=1.0), request(seed=5, temperature=1.0, top_p=0.9999)]
    together = drawn(logits_V.expand(3, -1), [alike[0], request(seed=9, top_k=3), alike[0]])
    alone = drawn(logits_V[None], alike[:1])
    assert together[0] == together[2] == alone[0]
    for others in (
        [request(seed=5, answer=[7] * i) for i in range(20)],
        [request(seed=2**64 - i) for i in range(20)],
    ):
        assert len(set(drawn(logits_V.expand(20, -1), others).values())) > 2


def test_at_temperature_0_a_draw_is_what_one_request_alone_is_given():
    asked = [
        request(temperature=0, logit_bias={3: 9.0, 5: -2.5}),
        request(
            answer=[4, 4, 9], temperature=0, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3
        ),
        request(temperature=0, min_tokens=2, eos=[int(logits(0).argmax())]),
    ]
    rows_NV = torch.stack([logits(0), logits(2), logits(0)])
    assert drawn(rows_NV, asked) == {i: sample(rows_NV[i], each) for i, each in enumerate(asked)}


def test_of_many_rows_a_few_are_drawn_at_a_time(monkeypatch):
    monkeypatch.setattr("nr_serve.engine.model.gpu_sampler._NUMBERS_AT_ONCE", 2 * VOCAB)
    rows_NV = torch.stack([logits(i) for i in range(5)])
    asked = [request(temperature=0, logit_bias={i: 100.0}) for i in range(5)]
    assert drawn(rows_NV, asked) == {i: i for i in range(5)}
    assert drawn(rows_NV, []) == {}


def test_a_guide_that_cannot_be_followed_leaves_its_request_out_and_no_other():
    class Broken:
        def allowed_bits(self):
            raise RuntimeError

    broken, other = request(temperature=0), request(temperature=0, logit_bias={3: 100.0})
    broken.progress = Broken()
    assert drawn(torch.stack([logits(0)] * 2), [broken, other]) == {1: 3}


def test_the_likeliest_of_a_row_with_a_nan_is_none():
    rows_NV = torch.stack([logits(0), logits(1), torch.zeros(VOCAB)])
    rows_NV[0, 7] = torch.nan
    expected = [NOT_A_NUMBER, int(logits(1).argmax()), 0]
    assert likeliest(rows_NV.to(DEVICE)).tolist() == expected


def test_a_block_holds_arrays_of_every_type_and_size():
    arrays = [
        torch.arange(5).numpy(),
        torch.arange(6, dtype=torch.int32).view(2, 3).T.numpy(),
        torch.tensor([[True], [False], [True]]).numpy(),
        torch.empty(0, dtype=torch.int64).numpy(),
        torch.rand(3, dtype=torch.float64).numpy(),
    ]
    for array, tensor in zip(arrays, _as_block(arrays, DEVICE), strict=True):
        assert torch.equal(tensor.cpu(), torch.from_numpy(array))
        assert tensor.data_ptr() % 16 == 0
        assert tensor.is_contiguous()
