"""Fused layers against the models they were made from."""

import copy

import pytest
import torch

from nr_serve.config import ServeConfig
from nr_serve.engine.cpu_operators import cpu_operators
from nr_serve.engine.fuse import FusedAttention, FusedFFN, FusedNorm, fuse
from nr_serve.engine.runner import Runner
from tests import tiny

FUSED = {
    "llama": (FusedNorm, FusedFFN, FusedAttention),
    "mistral": (FusedNorm, FusedFFN, FusedAttention),
    "qwen2": (FusedNorm, FusedFFN, FusedAttention),
    "qwen3": (FusedNorm, FusedFFN),
    "gemma3_text": (),
}


@pytest.fixture(scope="module")
def operators():
    made = cpu_operators()
    if made is None:
        pytest.skip("no C++ compiler here")
    return made


@pytest.mark.parametrize("kind", FUSED)
def test_what_is_known_is_fused_and_nothing_else(operators, kind):
    model = tiny.model(kind)
    before = {name: type(module) for name, module in model.named_modules()}
    fuse(model, operators)
    fused = {type(module) for module in model.modules()} & {FusedNorm, FusedFFN, FusedAttention}
    assert fused == set(FUSED[kind])
    if not fused:
        assert {name: type(module) for name, module in model.named_modules()} == before


def test_an_ffn_of_another_activation_stays(operators):
    model = tiny.model("llama", hidden_act="gelu")
    fuse(model, operators)
    assert not any(isinstance(module, FusedFFN) for module in model.modules())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("part", ["norm", "ffn"])
def test_a_fused_part_computes_what_the_part_did(operators, kind, part):
    model = tiny.model(kind)
    fused = copy.deepcopy(model)
    fuse(fused, operators)
    name = {"norm": "post_attention_layernorm", "ffn": "mlp"}[part]
    own, new = (getattr(each.model.layers[1], name) for each in (model, fused))
    x = torch.randn(1, 9, tiny.D)
    with torch.inference_mode():
        torch.testing.assert_close(new(x), own(x))


def test_weights_are_moved_and_not_doubled(operators):
    model = tiny.model("qwen2").requires_grad_(False)
    parameters = sum(p.numel() for p in model.parameters())
    fuse(model, operators)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("compiled", [True, False])
def test_the_setting_says_whether_steps_use_them(operators, compiled):
    config = ServeConfig(pages=40, compile=compiled)
    runner = Runner(tiny.model(), tiny.tokenizer(), config, "tiny")
    assert (runner.operators is not None) is compiled
    assert any(isinstance(module, FusedAttention) for module in runner.model.modules()) is compiled
