"""Blocks by our own products against float64, and a token's residue alone against that among others."""

import pytest
import torch

from nr_serve.neutral import math
from nr_serve.neutral.bank import Bank
from nr_serve.neutral.cpu_bank import CpuBank
from nr_serve.neutral.format import Adapter, AdapterInfo, Block
from tests.banks import attach, singles
from tests.compiled import SHARING, computed_by, operators_or_skip

SLOTS, CARRY = 3, 0.3
SHAPES = [(16, 1, 5), (48, 24, 24), (64, 100, 33), (80, 17, 17), (576, 128, 128)]
"""Of a model's width, a slot's, and the third adapter's block."""


def bank(d: int, width: int) -> CpuBank:
    operators = operators_or_skip()
    if operators.multiply is None:
        pytest.skip("this processor has no AVX512-BF16")
    shape = {"layers": 1, "d": d, "slots": SLOTS, "width": width, "rows": 130, "labels": 1}
    return CpuBank(operators.residues, multiplies=True, **shape, device=torch.device("cpu"), dtype=torch.bfloat16)


def random_adapter(d: int, h: int, bias: float, g: torch.Generator) -> Adapter:
    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).bfloat16()

    gate, w_in, w_gate = (rand(*shape) / d**0.5 for shape in ((d,), (h, d), (h, d)))
    block = Block(gate.float(), torch.tensor(bias), w_in, w_gate, rand(d, h))
    return Adapter(AdapterInfo("", "", 1, d, carry=CARRY), (block,), version="", nbytes=0)


def residues(
    on: Bank, x_Td: torch.Tensor, y_Td: torch.Tensor, selected_TS: torch.Tensor | None = None
) -> torch.Tensor:
    on.state_LRS.zero_()  # no token is a text's first
    every = torch.ones(len(x_Td), SLOTS, dtype=torch.bool)
    on.begin(singles(every if selected_TS is None else selected_TS))
    out = on.add_residues(0, x_Td, y_Td.clone())
    on.end()
    return out


@pytest.mark.parametrize("threads", SHARING)
@pytest.mark.parametrize(("d", "width", "h"), SHAPES)
def test_residues_are_the_formula(d, width, h, threads):
    g = torch.Generator().manual_seed(d)
    on = bank(d, width)
    # The second slot's weights are overwritten: what a wider block left there must not be read.
    attach(on, 1, random_adapter(d, width, 9.0, g))
    widths = max(1, width // 2), 1, min(h, width)
    adapters = [random_adapter(d, own, bias, g) for own, bias in zip(widths, (0.0, -0.5, 0.7), strict=True)]
    for slot, one in enumerate(adapters):
        attach(on, slot, one)
    for count in (1, 2, 9, 17, 33, 130):
        x_Td, y_Td = torch.randn(2, count, d, generator=g).bfloat16()
        want_Td, fired_ST = y_Td.double(), []
        for one in adapters:
            (block,) = one.blocks
            m_T = (1 - CARRY) * (x_Td.double() @ block.gate.double() + block.bias.double())
            weights = (w.double() for w in (block.w_in, block.w_gate, block.w_out))
            want_Td = want_Td + math.residue(x_Td.double(), math.block_gate(m_T, 0.0), *weights)
            fired_ST.append(m_T > 0)
        with computed_by(threads):
            got_Td = residues(on, x_Td, y_Td)
        scale = max(1.0, float(want_Td.abs().max()))
        torch.testing.assert_close(got_Td.double(), want_Td, rtol=0, atol=2e-2 * scale)
        shut_T = ~torch.stack(fired_ST).any(0)
        assert torch.equal(got_Td[shut_T], y_Td[shut_T])
    assert shut_T.any()
    assert not shut_T.all()


@pytest.mark.parametrize("threads", SHARING)
def test_a_token_alone_has_the_same_residue_as_among_others(threads):
    d, width = 576, 100
    g = torch.Generator().manual_seed(7)
    on = bank(d, width)
    for slot, bias in enumerate((0.0, 0.4, 9.0)):
        attach(on, slot, random_adapter(d, width, bias, g))
    x_Td, y_Td = torch.randn(2, 100, d, generator=g).bfloat16()
    selected_TS = torch.rand(100, SLOTS, generator=g) < 0.7
    with computed_by(threads):
        together_Td = residues(on, x_Td, y_Td, selected_TS)
        assert not torch.equal(together_Td, y_Td)
        assert not torch.equal(together_Td, residues(on, x_Td, y_Td))
        for first, end in ((0, 1), (1, 2), (2, 12), (12, 45), (45, 100)):
            own = slice(first, end)
            assert torch.equal(residues(on, x_Td[own], y_Td[own], selected_TS[own]), together_Td[own])


def test_weights_written_in_parts_are_those_written_at_once(monkeypatch):
    one = random_adapter(576, 100, 0.0, torch.Generator().manual_seed(8))
    whole, in_parts = bank(576, 100), bank(576, 100)
    assert len(list(whole.attach(1, one, 0.0))) == 2
    monkeypatch.setattr("nr_serve.neutral.bank._COPIED", 20 * 576)
    assert len(list(in_parts.attach(1, one, 0.0))) > 10
    for name in ("w_up_SLud", "w_out_SLhd"):
        assert torch.equal(getattr(in_parts, name)[1], getattr(whole, name)[1])
