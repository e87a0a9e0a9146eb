"""Packed linear layers against float64 and against the model they were packed from."""

import copy

import pytest
import torch
from torch import nn

from nr_serve.config import ServeConfig
from nr_serve.engine.model import packed_linear
from nr_serve.engine.model.packed_linear import (
    Multiply,
    PackedLinear,
    PairedLinear,
    can_pack,
    can_pair,
    pack_linears,
)
from nr_serve.engine.model.runner import Runner
from tests import tiny
from tests.compiled import SHARING, computed_by, operators_or_skip

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def need(dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip("this torch or CPU has no packed products")


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_packed_layer_computes_the_product(dtype, keep, has_bias):
    need(dtype)
    torch.manual_seed(0)
    weight = torch.randn(77, 51).to(dtype)
    bias = torch.randn(77).to(dtype) if has_bias else None
    layer = PackedLinear(weight, bias, keep=keep)
    for shape in ((1, 0), (1, 1), (1,), (2, 3), (1, 8), (1, 33), (300,)):
        x = torch.randn(*shape, 51).to(dtype)
        want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        with torch.inference_mode():
            got = layer(x)
        assert got.dtype == dtype
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=ROUNDING[dtype], atol=10 * ROUNDING[dtype])


def test_a_packed_layer_takes_rows_that_do_not_lie_together():
    need(torch.float32)
    weight, x = torch.randn(20, 12), torch.randn(9, 24)[:, ::2]
    torch.testing.assert_close(PackedLinear(weight, None, keep=False)(x), x @ weight.T)


@pytest.fixture
def multiply() -> Multiply:
    made = operators_or_skip().multiply
    if made is None:
        pytest.skip("no product of our own here")
    return made


@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (16, 2), (32, 50), (112, 30), (64, 32)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("threads", SHARING)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_our_own_product_is_the_product(multiply, outputs, inputs, has_bias, threads, dtype):
    torch.manual_seed(outputs)
    weight = torch.randn(outputs, inputs).bfloat16()
    bias = torch.randn(outputs).bfloat16() if has_bias else None
    layer = PairedLinear(weight, bias, multiply, dtype, torch.empty(weight.numel()).bfloat16())
    with computed_by(threads):
        for shape in ((1, 0), (1, 1), (1,), (2, 3), (8,), (1, 9), (1, 17), (33,), (100,)):
            x = torch.randn(*shape, inputs).bfloat16()
            want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
            got = layer(x)
            assert got.dtype == dtype
            rtol, atol = (4e-3, 1e-4) if dtype == torch.bfloat16 else (1e-6, 2e-6)
            torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol * inputs**0.5)
            if x.numel():
                alone = layer(x[..., -1:, :])
                assert torch.equal(alone, got[..., -1:, :]), "what shares the step must not matter"


def test_our_own_product_refuses_what_does_not_fit(multiply):
    packed, x = torch.zeros(16 * 6).bfloat16(), torch.zeros(2, 6)
    for wrong, bias in (
        (x, None),
        (torch.zeros(2, 7).bfloat16(), None),
        (x.bfloat16(), torch.zeros(15).bfloat16()),
    ):
        with pytest.raises(RuntimeError):
            multiply(wrong, packed, bias, torch.bfloat16)
    with pytest.raises(RuntimeError):
        multiply(torch.zeros(2, 0).bfloat16(), packed, None, torch.bfloat16)


def test_our_own_product_does_not_round_logits(multiply):
    need(torch.bfloat16)
    model = nn.ModuleDict({"lm_head": nn.Linear(576, 64), "other": nn.Linear(576, 64)}).bfloat16()
    weight, bias, x = (
        model["lm_head"].weight.double(),
        model["lm_head"].bias.double(),
        torch.randn(3, 576).bfloat16(),
    )
    pack_linears(model, multiply)
    torch.testing.assert_close(model["lm_head"](x).double(), x.double() @ weight.T + bias, rtol=1e-5, atol=1e-5)
    assert model["other"](x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "dtype"), [((77, 50), torch.bfloat16), ((48, 51), torch.bfloat16), ((48, 50), torch.float32)]
)
def test_what_our_own_product_does_not_take_is_left_to_onednn(multiply, shape, dtype):
    need(dtype)
    assert not can_pair(torch.zeros(shape, dtype=dtype))
    model = nn.Sequential(nn.Linear(shape[1], shape[0], dtype=dtype))
    pack_linears(model, multiply)
    assert type(model[0]) is PackedLinear


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_a_packed_model_gives_its_own_logits(kind, ours, dtype):
    need(dtype)
    operators = operators_or_skip() if ours else None
    model = tiny.model(kind).to(dtype).requires_grad_(False)
    packed = copy.deepcopy(model)
    pack_linears(packed, None if operators is None else operators.multiply)
    assert not any(type(module) is nn.Linear for module in packed.modules())
    for tokens in (1, 2, 40):
        ids = torch.arange(tokens)[None]
        with torch.inference_mode():
            want = model(input_ids=ids, use_cache=False).logits
            got = packed(input_ids=ids, use_cache=False).logits
        scale = float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=0, atol=5 * ROUNDING[dtype] * scale)


def plain_bytes(model) -> int:
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = [m.weight for m in model.modules() if isinstance(m, PackedLinear) and m.weight is not None]
    return sum(weight.nbytes for weight in weights if id(weight) not in embedded)


def test_only_a_small_float32_base_keeps_its_plain_weights(monkeypatch):
    need(torch.float32)
    small, large = tiny.model().requires_grad_(False), tiny.model().requires_grad_(False)
    pack_linears(small)
    assert plain_bytes(small) > 0
    monkeypatch.setattr(packed_linear, "_KEEP_BYTES", 1000)
    pack_linears(large)
    assert plain_bytes(large) == 0
    assert large.lm_head.weight is large.model.embed_tokens.weight, "it is in memory anyway"


def test_a_bfloat16_base_keeps_no_plain_weights():
    need(torch.bfloat16)
    model = tiny.model().bfloat16().requires_grad_(False)
    pack_linears(model)
    assert plain_bytes(model) == 0
    assert model.lm_head.weight is None


def test_without_packed_products_the_base_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(packed_linear, "can_pack", lambda dtype: False)
    model = tiny.model().requires_grad_(False)
    before = list(model.modules())
    pack_linears(model)
    assert list(model.modules()) == before


def test_packing_changes_neither_fingerprint_nor_slot_width(monkeypatch):
    need(torch.float32)

    def made():
        runner = Runner(tiny.model(), tiny.tokenizer(), ServeConfig(pages=40), "tiny")
        return runner.info, runner.bank.width

    packed = made()
    monkeypatch.setattr(packed_linear, "can_pack", lambda dtype: False)
    assert made() == packed
