"""The bank's fast path against the definition, summed naively in float64, request by request."""

from dataclasses import replace

import pytest
import torch

from nr_serve.errors import BadAdapterFile
from nr_serve.neutral import math
from nr_serve.neutral.format import Adapter, AdapterInfo, Block
from nr_serve.neutral.step import Trial
from tests.banks import (
    LABELS,
    LAYERS,
    ROWS,
    SLOTS,
    WIDTH,
    D,
    NaiveBank,
    NaiveSlot,
    adapter,
    assert_totals,
    attach,
    counters,
    cpu_bank,
    observed_step,
    singles,
    small,
    step,
    tokens,
)
from tests.compiled import SHARING, computed_by

NAN = float("nan")


def test_y_comes_back_to_the_bit_where_no_gate_fired(bank):
    on, shut = bank(), adapter(1, bias=-100.0)
    attach(on, 0, shut)
    attach(on, 1, adapter(2))
    x_LTd = torch.randn(LAYERS, 7, D, generator=torch.Generator().manual_seed(0))
    y_LTd = torch.randn(LAYERS, 7, D, generator=torch.Generator().manual_seed(1))
    y_LTd[:, :, 0], y_LTd[:, :, 1], y_LTd[:, :, 2] = -0.0, NAN, 1e-42  # what adding 0 would not keep
    for selected in ((), (0,), (0, 2)):
        out, fired_TS = step(on, [(0, 4, selected), (1, 3, selected)], x_LTd, y_LTd)
        assert torch.equal(out.view(torch.int32), y_LTd.view(torch.int32))
        assert not fired_TS.any()
    # And token by token, where a neighbour's gate fired.
    out, fired_TS = step(on, [(0, 4, (0, 1)), (1, 3, (0, 1))], x_LTd, y_LTd)
    assert fired_TS.any()
    logits_LT = torch.stack([math.gate_logit(x_LTd[i], on.gate_LSd[i, 1], on.bias_LS[i, 1]) for i in range(LAYERS)])
    closed_LT = logits_LT < 0
    assert closed_LT.any()
    assert torch.equal(out[closed_LT].view(torch.int32), y_LTd[closed_LT].view(torch.int32))
    assert not torch.equal(out[~closed_LT].view(torch.int32), y_LTd[~closed_LT].view(torch.int32))


def test_an_adapter_is_copied_a_few_rows_at_a_time(bank, monkeypatch):
    g = torch.Generator().manual_seed(3)
    x_LTd, y_LTd = torch.randn(2, LAYERS, 7, D, generator=g)
    whole, parts = bank(), bank()
    attach(whole, 0, adapter(2))
    monkeypatch.setattr("nr_serve.neutral.bank._COPIED", 3 * D)
    assert sum(1 for _ in parts.attach(0, adapter(2), 0.0)) > 3 * LAYERS
    expected, fired_TS = step(whole, [(0, 7, (0,))], x_LTd, y_LTd)
    assert fired_TS.any()
    assert torch.equal(step(parts, [(0, 7, (0,))], x_LTd, y_LTd)[0], expected)


@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("detached", [True, False])
def test_poisoned_slots_that_are_not_selected_never_touch_the_output(bank, poison, detached):
    g = torch.Generator().manual_seed(3)
    x_LTd, y_LTd = torch.randn(2, LAYERS, 12, D, generator=g)
    clean, wild = bank(), bank()
    for each in (clean, wild):
        attach(each, 1, adapter(1, carry=0.5))
        attach(each, 3, adapter(3))
        attach(each, 2, adapter(2))
    for weights in (wild.gate_LSd[:, 2], wild.bias_LS[:, 2], wild.w_up_SLud[2], wild.w_out_SLhd[2]):
        weights.fill_(poison)
    if detached:
        clean.detach(2)
        wild.detach(2)
    pieces = [(0, 5, (1, 3)), (2, 1, ()), (3, 6, (1,))]
    for _ in range(2):  # the second step goes on from the states of the first
        want, want_fired_TS = step(clean, pieces, x_LTd, y_LTd)
        got, fired_TS = step(wild, pieces, x_LTd, y_LTd)
        assert torch.equal(got, want)
        assert torch.equal(fired_TS, want_fired_TS)
    totals, want_totals = wild.read_totals(), clean.read_totals()
    assert (totals.fired_LS, totals.seen_LS) == (want_totals.fired_LS, want_totals.seen_LS)
    assert totals.mass_S == want_totals.mass_S


def test_a_request_gone_wild_does_not_spoil_the_others_nor_the_statistics(bank):
    on, calm = bank(), bank()
    attach(on, 0, adapter(1, carry=0.5))
    attach(calm, 0, adapter(1, carry=0.5))
    x_LTd, y_LTd = torch.randn(2, LAYERS, 9, D, generator=torch.Generator().manual_seed(4))
    want, _ = step(calm, [(0, 4, (0,)), (2, 3, (0,))], x_LTd[:, [0, 1, 2, 3, 6, 7, 8]], y_LTd[:, :7])
    wild_LTd = x_LTd.clone()
    wild_LTd[:, 4:6] = NAN
    got, _ = step(on, [(0, 4, (0,)), (1, 2, (0,)), (2, 3, (0,))], wild_LTd, y_LTd[:, [0, 1, 2, 3, 0, 0, 4, 5, 6]])
    torch.testing.assert_close(got[:, [0, 1, 2, 3, 6, 7, 8]], want)
    totals = on.read_totals()
    assert totals.mass_S == pytest.approx(calm.read_totals().mass_S), "one NaN would stay in the totals for ever"


def test_an_adapter_acts_only_once_all_of_it_is_copied(bank):
    on = bank()
    x_LTd, y_LTd = torch.randn(2, LAYERS, 6, D, generator=torch.Generator().manual_seed(5))
    attach(on, 1, adapter(1))
    only_other, _ = step(on, [(0, 6, (1,))], x_LTd, y_LTd)
    attach(on, 0, adapter(3))  # the one it replaces is shut from the first piece on
    copy = on.attach(0, adapter(2), 0.0)
    on.forget_row(0)
    for _ in range(LAYERS):
        next(copy)
        got, fired_TS = step(on, [(0, 6, (0, 1))], x_LTd, y_LTd)
        on.forget_row(0)
        assert torch.equal(got, only_other)
        assert not fired_TS[:, 0].any()
    assert next(copy, "done") == "done"
    got, fired_TS = step(on, [(0, 6, (0, 1))], x_LTd, y_LTd)
    assert fired_TS[:, 0].any()
    assert not torch.equal(got, only_other)


def test_a_narrow_adapter_is_not_widened_by_the_one_before_it_in_the_slot(bank):
    x_LTd, y_LTd = torch.randn(2, LAYERS, 20, D, generator=torch.Generator().manual_seed(6))
    fresh, used = bank(), bank()
    attach(used, 2, adapter(1))
    used.detach(2)
    for each in (fresh, used):
        attach(each, 2, adapter(2, widths=(2, 0, 1)))
    want, fired_TS = step(fresh, [(0, 20, (2,))], x_LTd, y_LTd)
    got, _ = step(used, [(0, 20, (2,))], x_LTd, y_LTd)
    assert torch.equal(got, want)
    assert fired_TS.any()
    assert torch.equal(got[1], y_LTd[1]), "the layer without a block adds nothing"
    assert [int(layer[2] > 0) for layer in used.read_totals().seen_LS] == [1, 0, 1]


def test_a_forgotten_row_starts_a_sequence_and_the_others_go_on(bank):
    on = bank()
    attach(on, 0, adapter(1, carry=0.9))
    x_LTd, y_LTd = torch.randn(2, LAYERS, 2, D, generator=torch.Generator().manual_seed(7))
    first, _ = step(on, [(0, 1, (0,)), (1, 1, (0,))], x_LTd, y_LTd)
    on.forget_row(0)
    states_LS = on.state_LRS[:, 1].clone()
    again, _ = step(on, [(0, 1, (0,))], x_LTd[:, :1], y_LTd[:, :1])
    torch.testing.assert_close(again, first[:, :1])
    assert torch.equal(on.state_LRS[:, 1, 0], states_LS[:, 0])
    assert not states_LS[:, 0].isnan().any()
    carried, _ = step(on, [(1, 1, (0,))], x_LTd[:, :1], y_LTd[:, :1])
    assert not torch.allclose(carried, again), "the carry of this test is too small to show a mistake"


def test_a_row_that_recalls_a_page_goes_on_as_the_row_that_filled_it(bank):
    on, whole = bank(), bank()
    for each in (on, whole):
        attach(each, 0, adapter(1, carry=0.9))
        attach(each, 2, adapter(2, carry=0.5))
    x_LTd, y_LTd = torch.randn(2, LAYERS, 9, D, generator=torch.Generator().manual_seed(9))
    want, want_open_TS = observed_step(whole, [(0, 9, (0, 2))], x_LTd, y_LTd)
    observed_step(on, [(0, 6, (0,))], x_LTd[:, :6], y_LTd[:, :6], ends=[(3, 1)])
    on.recall_row(4, 1)
    got, open_TS = observed_step(on, [(4, 5, (0, 2))], x_LTd[:, 4:], y_LTd[:, 4:])
    torch.testing.assert_close(got, want[:, 4:])
    assert torch.equal(open_TS, want_open_TS[4:]), "slots that were not selected carry on too"
    # What an adapter left at a page's end is nothing to the next one in its slot.
    attach(on, 0, adapter(3, carry=0.9))
    on.recall_row(4, 1)
    assert on.state_LRS[:, 4, 0].isnan().all()
    assert not on.state_LRS[:, 4, 2].isnan().any()


@pytest.mark.parametrize("beside", [[], [(0, 1, (0,)), (1, 1, ())], [(0, 1, (0,)), (1, 5, (0,))]], ids=len)
@pytest.mark.parametrize("shut", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_tokens_on_trial_have_a_threshold_of_their_own_and_touch_nothing_else(bank, beside, shut, count):
    what, other = adapter(1, carry=0.5, bias=1.0), adapter(2)
    on, calm, naive = bank(), bank(), NaiveBank()
    for each in (on, calm):
        attach(each, 0, other)
        attach(each, 2, what, threshold=torch.inf if shut else 0.1)
    naive.slots[2] = NaiveSlot(what, -0.2)
    before = sum(n for _, n, _ in beside)
    x_LTd, y_LTd = torch.randn(2, LAYERS, before + count, D, generator=torch.Generator().manual_seed(11))
    labels = [3] * (len(beside) + 1)
    on.begin(replace(tokens([*beside, (4, count, (2,))], labels), trial=Trial(before, slot=2, threshold=-0.2)))
    got = torch.stack([on.add_residues(i, x_LTd[i], y_LTd[i].clone()) for i in range(LAYERS)])
    open_TS = on.end()
    want, want_open_TS = naive.step([(4, count, (2,))], x_LTd[:, before:], y_LTd[:, before:], [0])
    torch.testing.assert_close(got[:, before:].double(), want, atol=1e-4, rtol=1e-5)
    assert torch.equal(open_TS[before:, 2], want_open_TS[:, 2])
    assert want_open_TS.any()
    if beside:
        alone, alone_open_TS = observed_step(calm, beside, x_LTd[:, :before], y_LTd[:, :before], labels[1:])
        torch.testing.assert_close(got[:, :before], alone)
        assert torch.equal(open_TS[:before], alone_open_TS)
        torch.testing.assert_close(on.state_LRS[:, :4], calm.state_LRS[:, :4], equal_nan=True)
    totals, calm_totals = on.read_totals(), calm.read_totals()
    assert counters(totals)[:2] == counters(calm_totals)[:2]
    assert (totals.mass_S, totals.cross_KS) == (pytest.approx(calm_totals.mass_S), calm_totals.cross_KS)
    assert torch.equal(on.threshold_S, calm.threshold_S)


@pytest.mark.parametrize("layers", [1, LAYERS], ids=["amid the layers", "behind them"])
def test_a_step_that_fails_leaves_states_and_statistics_as_they_were(bank, layers):
    on = bank()
    attach(on, 0, adapter(1, carry=0.9))
    x_LTd, y_LTd = torch.randn(2, LAYERS, 4, D, generator=torch.Generator().manual_seed(10))
    observed_step(on, [(0, 4, (0,))], x_LTd, y_LTd)
    on.read_totals()
    states_LRS, pages_LNS = on.state_LRS.clone(), on.page_state_LNS.clone()
    on.begin(tokens([(0, 4, (0,))], ends=[(2, 0)]))
    for layer in range(layers):
        on.add_residues(layer, x_LTd[layer], y_LTd[layer].clone())
    on.drop()
    torch.testing.assert_close(on.state_LRS, states_LRS, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(on.page_state_LNS, pages_LNS, equal_nan=True, rtol=0, atol=0)
    assert not any(torch.tensor(counter).any() for counter in counters(on.read_totals()))


def test_with_nothing_attached_a_step_costs_and_changes_nothing(bank):
    on = bank()
    attach(on, 0, adapter(1))
    on.detach(0)
    y_Td = torch.randn(3, D)
    on.begin(tokens([(0, 3, (0,))]))
    assert on.add_residues(0, torch.randn(3, D), y_Td) is y_Td
    assert on.end() is None
    assert not any(torch.tensor(counter).any() for counter in counters(on.read_totals()))


def test_a_bfloat16_stream_opens_the_gates_of_float32_logits(bank):
    """Gates are evaluated in float32 whatever the stream is; only the block's product is rounded."""
    on, what = bank(torch.bfloat16), adapter(8, carry=0.5)
    attach(on, 1, what)
    x_LTd, y_LTd = torch.randn(2, LAYERS, 40, D, generator=torch.Generator().manual_seed(8)).bfloat16()
    got, fired_TS = step(on, [(0, 40, (1,))], x_LTd, y_LTd)
    assert got.dtype == torch.bfloat16
    naive = NaiveBank()
    naive.slots[1] = NaiveSlot(what, 0.0)
    want, want_open_TS = naive.step([(0, 40, (1,))], x_LTd, y_LTd, [0])
    assert torch.equal(fired_TS, want_open_TS)
    torch.testing.assert_close(got.double(), want, atol=0.1, rtol=0.05)


def test_an_adapter_wider_than_a_slot_is_refused_by_name_of_the_flag(bank):
    wide = adapter(9, widths=(1, WIDTH + 1, 1))
    with pytest.raises(BadAdapterFile, match=f"--slot-width {WIDTH + 1}"):
        bank().check_fits(wide)
    on = bank()
    with pytest.raises(BadAdapterFile):
        next(on.attach(0, wide, 0.0))
    assert on.attached == set()


def test_slots_beyond_a_group_of_the_operators_are_as_the_first(bank):
    count, d, tokens_ = 19, 40, 9
    g = torch.Generator().manual_seed(12)
    on = bank(layers=1, d=d, slots=count, width=3, rows=tokens_)
    adapters = []
    for slot in range(count):
        w, b = torch.randn(d, generator=g), torch.randn((), generator=g)
        w_in, w_gate, w_out = torch.randn(3, 3, d, generator=g)
        block = Block(w, b, w_in, w_gate, w_out.T.contiguous())
        adapters.append(Adapter(AdapterInfo("", "", 1, d, carry=0.3), (block,), version="", nbytes=0))
        attach(on, slot, adapters[-1], 0.2)
    on.state_LRS.zero_()  # no token is a text's first
    x_Td, y_Td = torch.randn(2, tokens_, d, generator=g)
    on.begin(singles(torch.ones(tokens_, count, dtype=torch.bool)))
    got_Td = on.add_residues(0, x_Td, y_Td.clone())
    want_Td, x_Td = y_Td.double(), x_Td.double()
    for adapter_ in adapters:
        block = adapter_.blocks[0]
        g_T = math.block_gate(0.7 * (x_Td @ block.gate.double() + block.bias.double()), 0.2)
        want_Td = want_Td + math.residue(x_Td, g_T, *(w.double() for w in (block.w_in, block.w_gate, block.w_out)))
    torch.testing.assert_close(got_Td.double(), want_Td, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("threads", SHARING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_step_is_as_its_tokens_one_by_one(bank, dtype, threads):
    """Blocks of many tokens are computed in other products than those of few; here are both."""
    on, naive = bank(dtype), NaiveBank()
    for slot, bias in ((0, 0.5), (1, -1.3), (3, 3.0)):
        what = adapter(slot, carry=0.3 * slot, bias=bias, widths=(WIDTH, 0, 2))
        attach(on, slot, what)
        naive.slots[slot] = NaiveSlot(what, 0.0)
    g = torch.Generator().manual_seed(13)
    for pieces in ([(0, 190, (0, 1, 3)), (2, 100, (0, 3)), (4, 1, (1,))], [(2, 300, (0, 1))]):
        T = sum(length for _, length, _ in pieces)
        x_LTd, y_LTd = torch.randn(2, LAYERS, T, D, generator=g).to(dtype)
        with computed_by(threads):
            got, fired_TS = step(on, pieces, x_LTd, y_LTd)
        before = naive.fired.clone()
        want, want_open_TS = naive.step(pieces, x_LTd, y_LTd, [0] * len(pieces))
        assert torch.equal(fired_TS, want_open_TS * tokens(pieces).selected_TS)
        many, few, *_ = (naive.fired - before).T
        assert many[2] > 80
        assert 0 < few[2] <= 16
        assert ((fired_TS[:, 0] > 0) & (fired_TS[:, 1] > 0)).any()
        rough = {} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.05}
        torch.testing.assert_close(got.double(), want, **(rough or {"atol": 1e-3, "rtol": 1e-4}))
    assert_totals(on, naive, seen=False)


def test_the_operator_refuses_rows_slots_and_tokens_that_are_not_there():
    """Each would be read or written behind a tensor's end."""
    on = small(cpu_bank)
    attach(on, 0, adapter(1, bias=9.0))  # open: labels are read then
    good = tokens([(1, 2, (0,))])
    wrong = [
        replace(good, row_T=torch.tensor([ROWS, ROWS])),
        replace(good, offset_T=torch.tensor([1, 2])),  # goes on from a token that is not in the step
        replace(good, selected_TS=good.selected_TS[:, 1:]),
        *(replace(good, trial=Trial(*where, threshold=0.0)) for where in ((1, SLOTS), (1, -1), (-1, 0), (3, 0))),
    ]
    for each in wrong:
        with pytest.raises(RuntimeError):
            on.begin(each)
    x = torch.ones(2, D)
    on.begin(good)
    for layer, other in ((LAYERS, x), (0, torch.ones(3, D)), (0, x.bfloat16())):
        with pytest.raises(RuntimeError):
            on.add_residues(layer, other, other.clone())
    for at in (replace(good, label_T=good.label_T[:1]), replace(good, label_T=good.label_T + LABELS)):
        on.begin(at)
        for layer in range(LAYERS):
            on.add_residues(layer, x, x.clone())
        with pytest.raises(RuntimeError):
            on.end()
