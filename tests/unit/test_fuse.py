"""Fused layers against the models they were made from."""

import copy
import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from nr_serve.config import ServeConfig
from nr_serve.engine.messages import Sampling, Submit
from nr_serve.engine.model import fuse as fuse_module
from nr_serve.engine.model import runner as runner_module
from nr_serve.engine.model.fuse import CompiledModel, FusedFFN, FusedLayer, FusedNorm, fuse
from nr_serve.engine.model.packed_linear import can_pack
from nr_serve.engine.model.runner import Runner
from tests import tiny
from tests.compiled import computed_by, operators_or_skip
from tests.unit.test_exactness import engine, load

FUSED = ["llama", "mistral", "qwen2", "qwen3"]
"""That they compute what the model did is seen in test_bases.py, token by token."""


@pytest.fixture(scope="module")
def operators():
    return operators_or_skip()


@pytest.mark.parametrize("kind", FUSED)
def test_layers_that_are_known_are_fused(operators, kind):
    model = tiny.model(kind)
    fuse(model, operators)
    assert all(type(layer) is FusedLayer for layer in model.model.layers)
    assert type(model.model.norm) is FusedNorm


def test_a_last_norm_of_another_class_stays(operators):
    class OtherNorm(torch.nn.LayerNorm):
        pass

    model = tiny.model("llama")
    model.model.norm = OtherNorm(tiny.D)
    fuse(model, operators)
    assert type(model.model.norm) is OtherNorm


@pytest.mark.parametrize(("kind", "changed"), [("gemma3_text", {}), ("llama", {"hidden_act": "gelu"})])
def test_others_stay_as_they_are(operators, kind, changed):
    model = tiny.model(kind, **changed)
    before = list(model.modules())
    fuse(model, operators)
    assert list(model.modules()) == before


def test_a_layer_with_a_linear_of_another_class_stays(operators):
    class Quantised(torch.nn.Linear):
        pass

    model = tiny.model("llama")
    model.model.layers[1].self_attn.k_proj.__class__ = Quantised
    fuse(model, operators)
    assert [type(layer) is FusedLayer for layer in model.model.layers] == [True, False, True]
    assert type(model.model.norm) is not FusedNorm


def test_a_fused_ffn_computes_what_the_ffn_did(operators):
    ffn = tiny.model("qwen3").model.layers[1].mlp
    x = torch.randn(1, 9, tiny.D)
    with torch.inference_mode():
        torch.testing.assert_close(FusedFFN(copy.deepcopy(ffn), operators.silu_mul)(x), ffn(x))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_weights_are_moved_and_not_doubled(operators, kind):
    model = tiny.model(kind).requires_grad_(False)
    parameters = sum(p.numel() for p in model.parameters())
    fuse(model, operators)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("compiled", [True, False])
def test_the_setting_says_whether_steps_use_them(operators, compiled):
    if not can_pack(torch.float32):
        pytest.skip("this torch has no packed products")
    runner = Runner(tiny.model(), tiny.tokenizer(), ServeConfig(pages=40, compile=compiled), "tiny")
    assert any(isinstance(module, FusedLayer) for module in runner.model.modules()) is compiled


@pytest.fixture
def products(operators):
    """The operators, where a model may be one call of them."""
    if operators.decoder is None:
        pytest.skip("no products of our own here")
    return operators


def answers(kind, threads=1, *, compiled=True, h=16, budget=24, **changed):
    """Answers in bfloat16, with log probabilities and gates, to prompts of all lengths beside two adapters."""
    base = tiny.model(kind, **changed).bfloat16()
    core, adapters = engine(base, pages=60, budget=budget, running=4, slot_width=h)
    assert all(type(layer) is FusedLayer for layer in base.model.layers)
    assert isinstance(core._runner.model, CompiledModel) is compiled
    for seed in (0, 1):
        load(adapters, f"a{seed}", tiny.adapter(tiny.model(kind, **changed), seed=seed, carry=0.5, h=h))
    operators_or_skip().share_among(threads)
    for i, length in enumerate((40, 1, 9, 3, 25)):
        sampling = Sampling(max_tokens=12, temperature=0, logprobs=3, ignore_eos=True)
        prompt = tuple((7 * i + 3 * place) % 290 for place in range(length))
        assert core.add(Submit(str(i), prompt, sampling, [None, (), ("a1",)][i % 3], gates=True)) is None
    given = {}
    while not core.idle:
        for output in core.step().outputs:
            assert output.error is None
            given.setdefault(output.request_id, []).extend(output.tokens)
    return given, {name: view.gates for name, view in core.statistics().adapters.items()}


def rope(kind: str) -> dict:
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    return {"rope_parameters": parameters | ({"original_max_position_embeddings": 32} if kind == "yarn" else {})}


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("llama", {}),
        ("llama", rope("linear") | {"rms_norm_eps": 0.1}),
        ("mistral", {"sliding_window": 6}),
        ("qwen2", rope("yarn")),
        ("qwen3", {}),
    ],
)
def test_a_model_in_one_call_computes_what_its_operators_do_to_the_bit(products, kind, changed, monkeypatch):
    got = answers(kind, **changed)
    monkeypatch.setattr(fuse_module, "compile_model", lambda model, *_: model)
    assert got == answers(kind, compiled=False, **changed)
    assert all(sum(gates.fired) for gates in got[1].values()), "or residues were not looked at"


@pytest.mark.parametrize("positions", [16, 40])
def test_a_base_of_few_positions_is_served_to_the_last_of_them(products, positions):
    base = tiny.model("llama", max_position_embeddings=positions)
    expected = tiny.Naive(base).logits(list(range(positions - 1)), [])[-1]
    core, _ = engine(copy.deepcopy(base).bfloat16(), pages=60, budget=24, running=4)
    assert isinstance(core._runner.model, CompiledModel)
    sampling = Sampling(max_tokens=1, temperature=0, logprobs=3)
    core.add(Submit("to the end", tuple(range(positions - 1)), sampling))
    outputs = []
    while not core.idle:
        outputs += core.step().outputs
    assert [token.id for token in outputs[-1].tokens] == [int(expected.argmax())]


def test_parts_of_other_classes_are_not_replaced(products):
    other_norm, other_embedding = (tiny.model("llama").bfloat16() for _ in range(2))
    other_norm.model.norm = type("OwnNorm", (type(other_norm.model.norm),), {})(tiny.D)
    other_norm.model.norm.to(torch.bfloat16)
    embedding = other_embedding.model.embed_tokens
    other_embedding.model.embed_tokens = type("OwnEmbedding", (torch.nn.Embedding,), {})(tiny.VOCAB, tiny.D)
    other_embedding.model.embed_tokens.weight = embedding.weight
    for base in (other_norm, other_embedding):
        core, _ = engine(base, pages=60, budget=24, running=4)
        assert not isinstance(core._runner.model, CompiledModel)


@pytest.mark.parametrize("budget", [24, 80])  # tokens of a step: one tile of them, and several
def test_threads_of_our_own_change_no_bit(products, budget):
    # So wide that three threads share each product, and each part of the residues.
    wide = {"intermediate_size": 2048, "hidden_size": 160, "h": 512, "budget": budget}
    with computed_by("three of our own"):
        shared, alone = (answers("llama", threads, **wide) for threads in (3, 1))
    assert shared == alone
    assert all(sum(gates.fired) for gates in shared[1].values()), "or residues were not looked at"


def test_a_model_in_such_calls_is_computed_by_threads_of_our_own_as_many_as_torchs(products, monkeypatch):
    counts = []
    watched = dataclasses.replace(products, share_among=counts.append)
    monkeypatch.setattr(runner_module, "cpu_operators", lambda: watched)
    ours = {"vocab_size": 304}
    with computed_by("two of torch"):
        for model in (
            tiny.model("llama", **ours).bfloat16(),
            tiny.model("llama").bfloat16(),
            tiny.model("llama", **ours),
            tiny.model("gemma3_text", **ours).bfloat16(),
        ):
            Runner(model, tiny.tokenizer(), ServeConfig(pages=40), "tiny")
            counts.append("made")
    assert counts == [2, "made", "made", "made", "made"], "of the others torch computes a part"


def test_layers_are_one_call_only_if_all_are_known(operators):
    base = tiny.model("llama", vocab_size=304).bfloat16()
    base.model.layers[1].mlp.act_fn = torch.nn.GELU()
    with computed_by("two of torch"):
        runner = Runner(base, tiny.tokenizer(), ServeConfig(pages=40), "tiny")
        assert torch.get_num_threads() == 2, "torch computes a part"
    assert runner.model is base
    assert [type(layer) is FusedLayer for layer in base.model.layers] == [True, False, True]


@pytest.mark.parametrize(("kind", "changed"), [("llama", {"head_dim": 24}), ("llama", {"intermediate_size": 90})])
def test_layers_whose_products_or_prompts_are_not_ours_stay_fused(operators, kind, changed):
    base = tiny.model(kind, **changed).bfloat16()
    assert Runner(base, tiny.tokenizer(), ServeConfig(pages=40), "tiny").model is base
    assert all(type(layer) is FusedLayer for layer in base.model.layers)


def test_a_model_of_another_class_runs_itself(operators):
    class Scaled(LlamaForCausalLM):
        """Its layers are known, but it does more with what they give."""

        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            output.logits = output.logits * 0.5
            return output

    base = tiny.model("llama").bfloat16()
    base.__class__ = Scaled
    assert Runner(base, tiny.tokenizer(), ServeConfig(pages=40), "tiny").model is base
