"""The kernels against the definition in float64: on a CUDA device, or else through Triton's interpreter."""

import os
import random
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from nr_serve.neutral import kernels, math

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """A step of one layer: pieces of (row, length, selected slots)."""

    pieces: list
    x_Td: torch.Tensor
    gate: kernels.Gate
    w_up_Sud: torch.Tensor
    w_out_SHd: torch.Tensor
    widths: list
    y_Td: torch.Tensor

    @property
    def tokens(self) -> int:
        return len(self.x_Td)

    def bounds(self):
        start = 0
        for row, length, slots in self.pieces:
            yield row, slice(start, start + length), slots
            start += length

    def step(self, page_T=None) -> kernels.Pieces:
        lengths = torch.tensor([length for _, length, _ in self.pieces])
        last_P = lengths.cumsum(0) - 1
        selected_TS = torch.zeros(self.tokens, len(self.widths), dtype=torch.bool)
        row_T = torch.zeros(self.tokens, dtype=torch.int64)
        for row, span, slots in self.bounds():
            row_T[span] = row
            selected_TS[span, list(slots)] = True
        page_T = torch.full_like(row_T, -1) if page_T is None else page_T
        on_device = (t.to(DEVICE) for t in (last_P - lengths + 1, last_P, row_T, selected_TS, page_T))
        return kernels.Pieces(*on_device, longest=int(lengths.max()))


def make(seed, *, pieces, d, widths, bias=0.0, dtype=torch.float32, rows=6, pages=5) -> Case:
    g = torch.Generator().manual_seed(seed)
    S, H, T = len(widths), max(widths) + 3, sum(length for _, length, _ in pieces)

    def rand(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=g).to(dtype).to(DEVICE)

    def weights(blocks):
        w_Sud = rand(S, blocks * H, d, dtype=dtype) / d**0.5
        for s, h in enumerate(widths):
            w_Sud[s, blocks * h :] = NAN  # what an earlier adapter left in the slot must never be read
        return w_Sud

    state_RS = rand(rows, S)
    state_RS[torch.rand(rows, S, generator=g).to(DEVICE) < 0.3] = NAN
    gate = kernels.Gate(
        w_Sd=rand(S, d) / d**0.5,
        b_S=torch.full((S,), bias, device=DEVICE) + 0.1 * rand(S),
        carry_S=torch.tensor([0.0, 0.5, 0.8, 0.95])[torch.arange(S) % 4].to(DEVICE),
        threshold_S=torch.tensor([0.0, 0.3, float("inf"), -0.2])[torch.arange(S) % 4].to(DEVICE),
        ceiling_S=torch.tensor([float("inf"), 0.4, 1.0])[torch.arange(S) % 3].to(DEVICE),
        state_RS=state_RS,
        page_state_NS=torch.full((pages, S), NAN, device=DEVICE),
        open_TS=torch.ones((T, S), dtype=torch.int32, device=DEVICE),
        fired_S=torch.full((S,), 100, dtype=torch.int64, device=DEVICE),
        mass_S=torch.full((S,), 10.0, dtype=torch.float64, device=DEVICE),
    )
    x_Td, y_Td = rand(T, d, dtype=dtype), rand(T, d, dtype=dtype)
    return Case(list(pieces), x_Td, gate, weights(2), weights(1), list(widths), y_Td)


def expected(case: Case):
    """m and g of every token and slot, and y, in float64 by the definition."""
    gate = case.gate
    z_TS = case.x_Td.double() @ gate.w_Sd.double().T + gate.b_S.double()
    m_TS, g_TS = torch.zeros_like(z_TS), torch.zeros_like(z_TS)
    y_Td = case.y_Td.double().clone()
    x_Td = case.x_Td.double()
    for row, span, slots in case.bounds():
        for s, h in enumerate(case.widths):
            state, threshold = gate.state_RS[row, s].double(), gate.threshold_S[s].double()
            m_TS[span, s] = math.carry(z_TS[span, s], float(gate.carry_S[s]), state)
            if s not in slots:
                continue
            g_TS[span, s] = math.block_gate(m_TS[span, s], threshold, float(gate.ceiling_S[s]))
            w_in_hd, w_gate_hd = case.w_up_Sud[s, : 2 * h].double().chunk(2)
            w_out_hd = case.w_out_SHd[s, :h].double()
            y_Td[span] += math.residue(x_Td[span], g_TS[span, s], w_in_hd, w_gate_hd, w_out_hd.T)
    return m_TS, g_TS, y_Td


@pytest.fixture
def poison(monkeypatch):
    """What a kernel leaves unwritten in its buffers reads as NaN, or as a number that is no index."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def fill(t):
        return t.fill_(NAN if t.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


def run(case: Case, **options):
    """g and y as the kernels compute them."""
    y_Td = case.y_Td.clone()
    width_S = torch.tensor(case.widths, dtype=torch.int32, device=DEVICE)
    g_TS = kernels.gates(case.x_Td, case.gate, case.step(options.pop("page_T", None)), **options)
    fired = kernels.compact(g_TS)
    u_STH = kernels.hidden(case.x_Td, g_TS, fired, case.w_up_Sud, width_S)
    kernels.add(y_Td, u_STH, fired, case.w_out_SHd, width_S)
    return g_TS, y_Td


def random_case(seed, dtype=torch.float32) -> Case:
    rng = random.Random(seed)
    S = rng.choice([1, 3, 5])
    decodes = rng.random() < 0.4
    count = rng.randint(1, 5)
    rows = rng.sample(range(6), count)
    pieces = [
        (row, 1 if decodes else rng.choice([1, 2, 7, 11]), rng.sample(range(S), rng.randint(0, S))) for row in rows
    ]
    widths = [rng.choice([0, 5, 16, 23, 70]) for _ in range(S)]
    d = rng.choice([24, 48, 130, 144])
    return make(seed, pieces=pieces, d=d, widths=widths, bias=rng.choice([-0.5, 0.0, 0.5]), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_a_random_step_is_as_defined(seed, dtype, poison):
    case = random_case(seed, dtype)
    m_TS, g_want_TS, y_want_Td = expected(case)
    g_TS, y_Td = run(case)
    torch.testing.assert_close(g_TS.double(), g_want_TS, atol=1e-5, rtol=1e-5)
    scale = y_want_Td.abs().max()
    assert (y_Td.double() - y_want_Td).abs().max() < TOLERANCE[dtype] * scale
    gate, fired_TS = case.gate, g_want_TS > 0
    assert (gate.open_TS - 1).tolist() == (m_TS > gate.threshold_S).int().tolist()
    assert (gate.fired_S - 100).tolist() == fired_TS.sum(0).tolist()
    torch.testing.assert_close(gate.mass_S - 10, g_want_TS.sum(0), atol=1e-5, rtol=1e-5)
    for row, span, _ in case.bounds():
        torch.testing.assert_close(gate.state_RS[row].double(), m_TS[span][-1], atol=1e-5, rtol=1e-5)
    untouched = ~fired_TS.any(1)
    assert torch.equal(y_Td[untouched].view(torch.uint8), case.y_Td[untouched].view(torch.uint8))


def test_a_piece_longer_than_a_block_carries_on(poison):
    case = make(1, pieces=[(0, 3, [0]), (1, 260, [0])], d=16, widths=[4])
    _, g_want_TS, _ = expected(case)
    torch.testing.assert_close(run(case)[0].double(), g_want_TS, atol=1e-5, rtol=1e-5)


def test_any_cut_of_a_sequence_gives_the_same_gates(poison):
    whole = make(2, pieces=[(3, 23, [0, 1, 3])], d=32, widths=[8] * 4)
    start = whole.gate.state_RS.clone()
    g_want_TS, _ = run(whole)
    state_after = whole.gate.state_RS[3].clone()
    whole.gate.state_RS.copy_(start)
    got, x_Td, y_Td = [], whole.x_Td, whole.y_Td
    for part in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 23)):
        length = part.stop - part.start
        whole.pieces = [(3, length, [0, 1, 3])]
        whole.x_Td, whole.y_Td = x_Td[part], y_Td[part]
        got.append(run(whole)[0])
    torch.testing.assert_close(torch.cat(got), g_want_TS, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.gate.state_RS[3], state_after, atol=1e-5, rtol=1e-5)


def test_the_states_at_the_ends_of_pages_are_kept_and_no_others(poison):
    case = make(3, pieces=[(0, 6, [0]), (1, 1, [0])], d=16, widths=[4, 4])
    m_TS, _, _ = expected(case)
    page_T = torch.full((7,), -1, device=DEVICE)
    page_T[3], page_T[6] = 4, 2
    run(case, page_T=page_T)
    kept = case.gate.page_state_NS
    torch.testing.assert_close(kept[[4, 2]].double(), m_TS[[3, 6]], atol=1e-5, rtol=1e-5)
    assert kept[[0, 1, 3]].isnan().all()


def test_where_every_gate_is_shut_no_weight_is_read_and_y_keeps_its_bits(poison):
    case = make(4, pieces=[(0, 5, [0, 1, 3]), (1, 1, [])], d=20, widths=[6] * 4, bias=-50.0)
    case.gate.state_RS.zero_()
    for weights in (case.w_up_Sud, case.w_out_SHd):
        weights.fill_(NAN)
    case.y_Td[2] = -0.0
    g_TS, y_Td = run(case)
    assert (g_TS == 0).all()
    assert torch.equal(y_Td.view(torch.uint8), case.y_Td.view(torch.uint8))


def test_a_slot_that_fired_leaves_the_weights_of_the_others_unread(poison):
    case = make(5, pieces=[(0, 3, [0]), (1, 2, [1])], d=20, widths=[6, 6, 6, 6], bias=50.0)
    case.gate.state_RS.zero_()
    for weights in (case.w_up_Sud, case.w_out_SHd):
        weights[2:] = NAN
    _, _, y_want_Td = expected(case)
    torch.testing.assert_close(run(case)[1].double(), y_want_Td, atol=1e-2, rtol=1e-4)


def test_a_stream_of_nan_is_shut_and_its_neighbours_are_as_they_were(poison):
    case = make(6, pieces=[(0, 2, [0, 1]), (1, 2, [0, 1])], d=20, widths=[6, 6], bias=2.0)
    _, _, y_want_Td = expected(case)
    case.x_Td[0] = NAN
    g_TS, y_Td = run(case)
    assert (g_TS[0] == 0).all()
    torch.testing.assert_close(y_Td[2:].double(), y_want_Td[2:], atol=1e-4, rtol=1e-4)
    assert case.gate.mass_S.isfinite().all()


def test_a_gate_gone_to_infinity_is_counted_but_not_weighed(poison):
    case = make(7, pieces=[(0, 1, [0])], d=20, widths=[6], bias=0.0)
    case.gate.b_S.fill_(float("inf"))
    case.gate.state_RS.zero_()
    run(case)
    assert (case.gate.fired_S.tolist(), case.gate.mass_S.tolist()) == ([101], [10.0])


def test_a_step_that_is_not_counted_moves_the_state_and_no_total(poison):
    case = make(8, pieces=[(0, 4, [0])], d=20, widths=[6], bias=2.0)
    m_TS, _, _ = expected(case)
    run(case, counts=False)
    assert (case.gate.fired_S.tolist(), case.gate.mass_S.tolist()) == ([100], [10.0])
    torch.testing.assert_close(case.gate.state_RS[0].double(), m_TS[-1], atol=1e-5, rtol=1e-5)


def test_more_slots_than_one_tile_holds(poison):
    case = make(9, pieces=[(0, 2, range(33)), (1, 1, [32])], d=24, widths=[(i % 5) * 4 for i in range(33)])
    _, g_want_TS, y_want_Td = expected(case)
    g_TS, y_Td = run(case)
    torch.testing.assert_close(g_TS.double(), g_want_TS, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y_Td.double(), y_want_Td, atol=1e-3, rtol=1e-4)


def test_weights_may_be_one_layer_of_the_banks_stack(poison):
    case = make(10, pieces=[(0, 2, [0, 1])], d=24, widths=[6, 9], bias=1.0)
    _, _, y_want_Td = expected(case)
    for name in ("w_up_Sud", "w_out_SHd"):
        w_SHd = getattr(case, name)
        stack_SLHd = torch.full((2, 3, *w_SHd.shape[1:]), NAN, device=DEVICE)
        stack_SLHd[:, 1] = w_SHd
        setattr(case, name, stack_SLHd[:, 1])
    torch.testing.assert_close(run(case)[1].double(), y_want_Td, atol=1e-3, rtol=1e-4)


def test_the_kernels_compile_for_a_gpu():
    """The interpreter takes more than the compiler does, which needs no GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compile", "--arch", "90", "--tokens", "1"],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 12
