"""The carry over pieces laid end to end is the definition's, however the pieces lie and wherever they are cut."""

import math as plain
import random

import pytest
import torch

from nr_serve.neutral import math
from nr_serve.neutral.scan import segmented_carry

CARRIES = [0.0, 0.5, 0.9, 0.0, 0.99, 0.123]
A = len(CARRIES)
NAN = float("nan")


def offsets(lengths):
    return torch.cat([torch.arange(n) for n in lengths])


def carried(z_TA, lengths, states_PA):
    return segmented_carry(z_TA, torch.tensor(CARRIES), offsets(lengths), states_PA)


def by_hand(z, a, state):
    """One gate over one piece, in Python's floats."""
    carried, m = [], state
    for logit in z:
        m = 0.0 if plain.isnan(m) else a * m + (1 - a) * logit
        carried.append(m)
    return carried


def reference(z_TA, lengths, states):
    """[T, A] in float64; `states` has one row per piece."""
    pieces = []
    for z_nA, state_A in zip(z_TA.split(lengths), states, strict=True):
        columns = [by_hand(z_nA[:, i].tolist(), CARRIES[i], state_A[i]) for i in range(A)]
        pieces.append(torch.tensor(columns, dtype=torch.float64).T)
    return torch.cat(pieces)


def test_the_definition_is_the_recurrence():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(40, generator=g, dtype=torch.float64)
    for a in CARRIES:
        for state in (NAN, 0.0, -3.5):
            got = math.carry(z, a, torch.tensor(state, dtype=torch.float64))
            assert got.tolist() == pytest.approx(by_hand(z.tolist(), a, state), abs=1e-12)
        assert torch.equal(math.carry(z, a), math.carry(z, a, NAN))


@pytest.mark.parametrize("seed", range(12))
def test_ragged_pieces_equal_the_recurrence(seed):
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [rng.choice([1, 1, 2, 3, 7, 31, 32, 33, 64, 65, 200]) for _ in range(rng.randint(1, 9))]
    z_TA = 3 * torch.randn(sum(lengths), A, generator=g)
    states = [[rng.choice([NAN, 0.0, rng.gauss(0, 5)]) for _ in range(A)] for _ in lengths]
    got = carried(z_TA, lengths, torch.tensor(states))
    torch.testing.assert_close(got.double(), reference(z_TA.double(), lengths, states), atol=2e-5, rtol=1e-5)


def test_the_first_token_of_a_sequence_has_no_say():
    z_TA = torch.randn(30, A, generator=torch.Generator().manual_seed(1))
    lengths = [1, 9, 20]
    got = segmented_carry(z_TA, torch.tensor(CARRIES), offsets(lengths))
    want = reference(z_TA.double(), lengths, [[NAN] * A] * 3)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    assert not got[[0, 1, 10]].any()


def test_a_sequence_cut_anywhere_carries_the_same():
    length = 70
    z_TA = torch.randn(length, A, generator=torch.Generator().manual_seed(2))
    whole = segmented_carry(z_TA, torch.tensor(CARRIES), torch.arange(length))
    cuts = [[i] for i in range(1, length)] + [
        sorted(random.Random(i).sample(range(1, length), 9)) for i in range(9)
    ]
    cuts.append(list(range(1, length)))
    for cut in cuts:
        state_1A, pieces = torch.full((1, A), NAN), []
        for z_nA in z_TA.tensor_split(cut):
            pieces.append(carried(z_nA, [len(z_nA)], state_1A))
            state_1A = pieces[-1][-1:]
        torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf"), 1e38])
def test_a_piece_gone_wild_does_not_reach_the_others(poison):
    lengths = [5, 6, 40]
    z_TA = torch.randn(51, A, generator=torch.Generator().manual_seed(3))
    states_PA = torch.randn(3, A, generator=torch.Generator().manual_seed(4))
    clean = carried(z_TA, lengths, states_PA)
    z_TA[5:11], states_PA[1] = poison, poison
    wild = carried(z_TA, lengths, states_PA)
    assert torch.equal(wild[:5], clean[:5])
    assert torch.equal(wild[11:], clean[11:])


def test_the_gradient_is_that_of_the_recurrence():
    lengths = [1, 2, 50, 17]
    g = torch.Generator().manual_seed(5)
    z_TA = torch.randn(sum(lengths), A, generator=g)
    cotangent_TA = torch.randn(sum(lengths), A, generator=g)

    fast = z_TA.clone().requires_grad_()
    segmented_carry(fast, torch.tensor(CARRIES), offsets(lengths)).backward(cotangent_TA)
    slow = z_TA.double().requires_grad_()
    pieces = []
    for z_nA in slow.split(lengths):
        columns = [math.carry(z_nA[:, i], CARRIES[i]) for i in range(A)]
        pieces.append(torch.stack(columns, dim=1))
    torch.cat(pieces).backward(cotangent_TA.double())
    assert slow.grad is not None
    assert fast.grad is not None
    torch.testing.assert_close(fast.grad.double(), slow.grad, atol=1e-5, rtol=1e-5)


def test_no_tokens_give_no_logits():
    empty = torch.zeros(0, A)
    assert segmented_carry(empty, torch.tensor(CARRIES), torch.zeros(0, dtype=torch.long)).shape == (0, A)
