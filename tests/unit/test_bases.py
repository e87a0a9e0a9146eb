"""Every supported class of base against transformers' own generate(); what cannot be served is refused."""

import copy
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from nr_serve.config import ServeConfig
from nr_serve.engine.messages import Sampling, SamplingDefaults, Submit
from nr_serve.engine.model.base import load_base
from nr_serve.engine.model.runner import Runner
from nr_serve.errors import UnsupportedBase
from nr_serve.train import frozen_base
from tests import tiny
from tests.unit.stepped import engine

WINDOW = {"sliding_window": 6}
BASES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": WINDOW,
    "gemma3_text": WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}


@pytest.mark.parametrize("kind", BASES)
def test_greedy_answers_equal_generate(kind):
    base = tiny.model(kind, **BASES[kind])
    prompts = [list(range(5, 45)), [7], [250, 3, 9, 11, 12, 80, 81, 82, 83, 84]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = copy.deepcopy(base).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False
        )
        expected.append(generated[0, len(prompt) :].tolist())
    core, _ = engine(base, pages=40, budget=16, running=4)
    for i, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=12, temperature=0, min_tokens=12)
        assert core.add(Submit(str(i), tuple(prompt), sampling)) is None
    answers = {}
    while not core.idle:
        for output in core.step().outputs:
            answers.setdefault(output.request_id, []).extend(t.id for t in output.tokens)
    assert [answers[str(i)] for i in range(len(prompts))] == expected


def runner(base, **settings):
    return Runner(copy.deepcopy(base), tiny.tokenizer(), ServeConfig(pages=40, **settings), "tiny")


def test_a_bases_own_sampling_is_taken_up_unless_it_must_not_be():
    base = tiny.model("llama")
    assert runner(base).info.sampling == SamplingDefaults()
    base.generation_config = GenerationConfig(temperature="0.5")
    with pytest.raises(UnsupportedBase, match=r"temperature: Input should be a valid number"):
        runner(base)
    base.generation_config = GenerationConfig(temperature=0.6, top_k=20, top_p=0.95, do_sample=True)
    assert runner(base).info.sampling == SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95)
    assert runner(base, generation_config="none").info.sampling == SamplingDefaults()
    base.generation_config = GenerationConfig(temperature=7.0)
    with pytest.raises(UnsupportedBase, match=r"temperature: .* less than or equal to 2"):
        runner(base)
    assert runner(base, generation_config="none").info.sampling == SamplingDefaults()


@pytest.mark.parametrize(
    ("kind", "overrides", "reason"),
    [
        ("gemma2", {}, "caps its attention logits"),
        ("mixtral", {"num_local_experts": 2}, "mixture-of-experts"),
        ("gpt2", {"n_embd": tiny.D, "n_head": 4, "n_layer": 2}, "no list of decoder layers"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic rotary",
        ),
        ("mamba", {"state_size": 4}, "layers of kind linear_attention"),
        ("nemotron", {}, "NemotronForCausalLM cannot be served: TypeError: .*nr_batch"),
    ],
)
def test_a_base_that_cannot_be_served_is_refused_with_the_reason(kind, overrides, reason):
    base = tiny.model(kind, **overrides)
    with pytest.raises(UnsupportedBase, match=reason):
        runner(base)


@pytest.mark.parametrize("change", ["encoder", "longrope"])
def test_what_the_configuration_says_of_a_base_is_heeded(change):
    base = tiny.model("llama")
    if change == "encoder":
        base.config.is_encoder_decoder = True
    else:
        base.config.rope_parameters = {**base.config.rope_parameters, "rope_type": "longrope"}
    with pytest.raises(UnsupportedBase, match={"encoder": "has an encoder", "longrope": "longrope rotary"}[change]):
        runner(base)


def test_the_longest_request_is_what_base_and_kv_cache_hold():
    base = tiny.model("llama")
    assert runner(base, page_size=16, max_model_len=100).info.max_model_len == 100
    few = {"page_size": 16}
    made = Runner(copy.deepcopy(base), tiny.tokenizer(), ServeConfig(pages=4, **few), "tiny")
    assert made.info.max_model_len == 64
    with pytest.raises(UnsupportedBase, match="the KV cache holds 64"):
        Runner(copy.deepcopy(base), tiny.tokenizer(), ServeConfig(pages=4, max_model_len=65, **few), "tiny")


def test_the_kv_cache_takes_the_memory_that_it_was_given():
    base = tiny.model("llama")
    config = ServeConfig(page_size=16, kv_cache_gib=0.001, slots=1, dtype="float32")
    made = Runner(copy.deepcopy(base), tiny.tokenizer(), config, "tiny")
    shape = base.config
    keys = shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    page_bytes = 16 * 2 * keys * 4
    assert made.pages > 1
    assert made.pages * page_bytes <= 0.001 * 2**30 < (made.pages + 1) * page_bytes


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"kv_cache_gib": 2**20}, r"a KV cache of [\d,]+ pages cannot be had \(--kv-cache-gib, --pages\)"),
        ({"slots": 1024, "slot_width": 2**20}, r"1024 slots cannot be had \(--slots, --slot-width\)"),
    ],
)
def test_more_memory_than_there_is_is_refused_and_the_flags_are_named(given, named):
    config = ServeConfig(**{"page_size": 16, "pages": None if "kv_cache_gib" in given else 4} | given)
    with pytest.raises(UnsupportedBase, match=named):
        Runner(tiny.model("llama"), tiny.tokenizer(), config, "tiny")


def test_the_base_computes_with_as_many_threads_as_were_given_or_may_be_used(base, monkeypatch):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            Runner.load(base, tiny.tokenizer(), ServeConfig(pages=40, slots=1, threads=threads), "tiny")
            assert torch.get_num_threads() == threads
        monkeypatch.setattr("nr_serve.engine.model.runner.cpu_limit", lambda: 1)
        Runner.load(base, tiny.tokenizer(), ServeConfig(pages=40, slots=1), "tiny")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_base_whose_logits_come_out_wrong_is_refused():
    base = tiny.model("llama")

    def scramble(module, args, kwargs, output):
        output.last_hidden_state = output.last_hidden_state * (2 if kwargs.get("nr_batch") is not None else 1)
        return output

    base.model.register_forward_hook(scramble, with_kwargs=True)
    with pytest.raises(UnsupportedBase, match="logits differ"):
        runner(base)


def test_a_base_whose_files_lack_weights_is_refused(tmp_path):
    tiny.save(tiny.model("llama"), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    for load in (partial(load_base, config=ServeConfig(device="cpu")), frozen_base.load_base):
        with pytest.raises(UnsupportedBase, match=r"files lack the weights model.layers.1.mlp.up_proj.weight"):
            load(str(tmp_path))
