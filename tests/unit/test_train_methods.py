"""Every method trains from one recipe, and is compared, swept and calibrated from its run's folder."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from nr_serve.errors import BadRequest, Conflict
from nr_serve.evaluate.compare import compare_runs, page, write_comparison
from nr_serve.neutral.format import read_adapter
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train.batches import Batches
from nr_serve.train.export import export_run
from nr_serve.train.frozen_base import load_base
from nr_serve.train.methods import block_parameters, lora_rank, make_learner
from nr_serve.train.recipe import BadRecipe
from nr_serve.train.recipe_file import parse_changes
from nr_serve.train.restore import load_run
from nr_serve.train.run import TrainingStopped, train
from nr_serve.train.run_text import read_run_text
from nr_serve.train.text import read_classes
from tests.tiny_run import weights, write_recipe

METHODS = ("neutral", "adapter", "lora", "finetune")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, corpus) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for method in METHODS:
        lr = 0.003 if method == "finetune" else 0.03
        recipe = write_recipe(folder, base, tokens=2560, lr=lr, method=method, data__original=["en.a.train.txt"])
        train(recipe, folder / method, corpus)
        made[method] = folder / method
    return made


def test_every_method_learns_the_target(runs):
    for method, folder in runs.items():
        results = checkpoints.load(checkpoints.latest(folder)).results
        assert results["hu.a"]["after"] < results["hu.a"]["before"] - 0.1, method


@pytest.mark.parametrize("method", METHODS)
def test_a_run_in_bfloat16_learns_and_keeps_what_it_trains_in_float32(tmp_path, base, corpus, method, monkeypatch):
    computed, forward = set(), LlamaMLP.forward

    def watched(ffn, x):
        y = forward(ffn, x)
        computed.add(y.dtype)
        return y

    monkeypatch.setattr(LlamaMLP, "forward", watched)
    train(write_recipe(tmp_path, base, method=method, run__dtype="bfloat16"), tmp_path / "out", corpus)
    assert torch.bfloat16 in computed
    if method != "finetune":  # whose base, in float32, is also measured without autocast
        assert computed == {torch.bfloat16}
    saved = checkpoints.load(checkpoints.latest(tmp_path / "out"))
    assert saved.results["hu.a"]["after"] < saved.results["hu.a"]["before"] - 0.1
    assert {tensor.dtype for tensor in saved.weights().values()} == {torch.float32}


def test_every_method_starts_as_the_base_and_equal_methods_train_equally_many_parameters(tmp_path, base):
    ids = torch.arange(40)[None]
    expected = load_base(str(base)).model(ids).logits
    sizes = {}
    for method in METHODS:
        recipe = write_recipe(tmp_path, base, method=method)
        frozen = load_base(str(base))
        learner = make_learner(recipe, frozen)
        learner.attached.begin(torch.arange(40)[None])
        assert torch.equal(frozen.model(ids).logits, expected), method
        sizes[method] = sum(p.numel() for p in learner.trained().values())
    assert sizes["neutral"] == sizes["adapter"] == block_parameters(recipe, load_base(str(base)))
    assert sizes["finetune"] == load_base(str(base)).parameters
    one_rank = sizes["lora"] / lora_rank(recipe, load_base(str(base)))
    assert abs(sizes["lora"] - sizes["neutral"]) <= one_rank / 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks__h": 2**20}, r"blocks\.h makes blocks of [\d,]+ parameters; the base has [\d,]+"),
        ({"blocks__h": [16]}, r"blocks\.h lists 1 widths; the base has \d+ layers"),
        ({"method": "lora", "lora__rank": 2**20}, r"lora\.rank is 1,048,576; the base is \d+ wide"),
    ],
)
def test_sizes_that_do_not_suit_the_base_are_refused(tmp_path, base, changes, said):
    frozen = load_base(str(base))
    with pytest.raises(BadRecipe, match=said):
        make_learner(write_recipe(tmp_path, base, **changes), frozen)


def test_a_loras_folder_is_read_by_peft_and_a_finetuned_one_by_transformers(runs, base):
    from peft import AutoPeftModelForCausalLM

    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain(ids).logits
    for method in ("lora", "finetune"):
        _, frozen, learner, _ = load_run(runs[method])
        learner.attached.begin(torch.arange(12)[None])
        expected = frozen.model.eval()(ids).logits
        folder = runs[method] / method
        if method == "lora":
            there = AutoPeftModelForCausalLM.from_pretrained(folder)  # which finds the base by the folder
        else:
            there = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.allclose(there.eval()(ids).logits, expected, atol=1e-4), method
        assert not torch.allclose(before, expected, atol=1e-2), method


def test_loras_update_is_scaled_by_alpha_over_rank(tmp_path, base):
    recipe = write_recipe(tmp_path, base, method="lora", lora__rank=4, lora__alpha=6)
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    plain, adapted = load_base(str(base)).model, load_base(str(base))
    learner = make_learner(recipe, adapted)
    for name, matrix in learner.trained().items():
        if "lora_B" in name:
            matrix.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
            a = learner.trained()[name.replace("lora_B", "lora_A")]
            layer = plain.get_submodule(name.removeprefix("base.").partition(".lora_B")[0].replace(".ffn", ""))
            layer.weight.data += 6 / 4 * matrix.detach() @ a.detach()
    assert torch.allclose(adapted.model(ids).logits, plain(ids).logits, atol=1e-5)


def test_a_plain_adapter_is_an_adapter_file_whose_gates_are_always_open(runs):
    adapter = read_adapter(runs["adapter"] / "hu.safetensors")
    assert all(not block.gate.any() and float(block.bias) == 1 for block in adapter.blocks)
    assert adapter.info.recipe["method"] == "adapter"


@pytest.mark.parametrize("kind", ["elu", "sigmoid", "tanh"])
def test_a_gate_that_is_never_zero_trains_but_makes_no_adapter_file(kind, tmp_path, base, corpus):
    gate = f"kind = '{kind}'\ninit = 'he'\ntrained = true"
    out = tmp_path / "out"
    made = train(write_recipe(tmp_path, base, tokens=256, gate=gate), out, corpus)
    assert made == out / "neutral"
    with pytest.raises(BadRequest, match=f"only relu and relu1 gates are served, not {kind}"):
        export_run(out, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_step_in_parts_is_nearly_the_same_step(tmp_path, base, corpus):
    made = []
    for parts in (1, 2):
        recipe = write_recipe(tmp_path, base, tokens=512, run__accumulate=parts)
        train(recipe, tmp_path / str(parts), corpus)
        made.append(weights(tmp_path / str(parts)))
    # Adam's first steps are nearly signs, so weights whose gradient is nearly 0 may differ by the rate.
    close = [torch.isclose(made[0][n], made[1][n], atol=2e-3).float().mean() for n in made[0] if "w_out" in n]
    assert min(close) > 0.9


def test_parts_of_a_step_hold_what_the_step_holds(tmp_path, base, corpus):
    recipe = write_recipe(tmp_path, base, run__original_share=0.1, run__background_share=0.1)
    classes = read_classes(corpus, recipe.data, load_base(str(base)).tokenizer, recipe.run)
    for parts in (1, 2, 4):
        batches = Batches(classes, recipe.run, processes=parts)
        assert len(batches) == recipe.run.steps * parts
        whole = Batches(classes, recipe.run, processes=1)
        for step in range(6):
            for name in ("target", "original", "background"):
                pieces = [batches[step * parts + part].get(name) for part in range(parts)]
                rows = [row.tolist() for piece in pieces if piece for row in piece[0]]
                expected = [row.tolist() for row in whole[step].get(name, [()])[0]]
                assert sorted(rows) == sorted(expected)
            assert all("target" in batches[step * parts + part] for part in range(parts))
    with pytest.raises(BadRecipe, match="do not divide into 3 parts"):
        Batches(classes, recipe.run, processes=3)
    with pytest.raises(BadRecipe, match="may have 6 target windows, too few for its 8 parts"):
        Batches(classes, recipe.run, processes=8)


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        ({}, {"target": 12, "original": 2, "background": 2}),
        ({"method": "lora"}, {"target": 14, "original": 2}),
        ({"method": "adapter"}, {"target": 14, "original": 2}),
        ({"method": "finetune"}, {"target": 14, "original": 2}),
        ({"loss__alpha": 0}, {"target": 16}),
        ({"loss__alpha": 0, "loss__lm_on_original": True}, {"target": 14, "original": 2}),
    ],
)
def test_text_that_no_loss_reads_takes_no_share_of_the_tokens(tmp_path, base, corpus, changes, shares):
    recipe = write_recipe(tmp_path, base, run__original_share=0.125, run__background_share=0.125, **changes)
    batches = read_run_text(recipe, corpus).batches
    read = Counter[str]()
    for step in range(16 // recipe.run.windows_a_step):
        windows = {role: each for role, each in batches[step].items() if role != "step"}
        read.update({role: len(ids_NT) for role, (ids_NT, _) in windows.items()})
    assert read == shares


def test_a_method_that_reads_no_background_needs_none(tmp_path, base, corpus):
    recipe = write_recipe(tmp_path, base, method="lora", tokens=256, data__background=[])
    assert train(recipe, tmp_path / "out", corpus).is_dir()


def fails(error: Exception) -> None:
    raise error


@pytest.fixture
def second_save_is(monkeypatch):
    """Have this done in place of a run's second checkpoint."""
    save, calls = checkpoints.save_weights, []

    def patch(write: Callable[[], None]) -> None:
        def saves(folder, tensors):
            calls.append(folder)
            write() if len(calls) > 1 else save(folder, tensors)

        monkeypatch.setattr(checkpoints, "save_weights", saves)

    return patch


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no device here is always full")
@pytest.mark.parametrize(
    "write",
    [
        lambda: FULL.write_text("x"),
        lambda: torch.save({"x": torch.zeros(10)}, FULL),
        lambda: fails(RuntimeError("basic_ios::clear: iostream error")),  # torch's, when the last bytes do not fit
        lambda: fails(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
    ],
    ids=["python", "torch", "torch at its end", "safetensors"],
)
def test_a_full_disk_is_told_and_the_last_good_checkpoint_kept(
    tmp_path, base, corpus, monkeypatch, second_save_is, write
):
    second_save_is(write)
    out = tmp_path / "out"
    with pytest.raises(TrainingStopped, match=r"cannot write a.*; the last good checkpoint is .*checkpoint-2"):
        train(write_recipe(tmp_path, base), out, corpus)
    monkeypatch.undo()
    train(write_recipe(tmp_path, base), out, corpus, resume=True)
    train(write_recipe(tmp_path, base), tmp_path / "whole", corpus)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(out).values(), weights(tmp_path / "whole").values(), strict=True)
    )


def test_a_fault_of_ours_while_saving_is_not_told_as_a_full_disk(tmp_path, base, corpus, second_save_is):
    second_save_is(lambda: fails(RuntimeError("The size of tensor a (3) must match")))
    with pytest.raises(RuntimeError, match="size of tensor"):
        train(write_recipe(tmp_path, base), tmp_path / "out", corpus)


def test_comparison_shares_follow_their_definition(runs, corpus, tmp_path):
    made = compare_runs(runs, corpus, ["hu.*.heldout.txt", "en.*.heldout.txt"], windows=4)
    assert made.target_sources == ("hu.a",)
    assert made.original_sources == ("en.b",)
    assert made.learned("finetune") == 1
    base_t, ft_t = made.base_losses["hu.a"], made.runs["finetune"].losses["hu.a"]
    assert made.learned("lora") == pytest.approx((base_t - made.runs["lora"].losses["hu.a"]) / (base_t - ft_t))
    rise = {name: run.losses["en.b"] - made.base_losses["en.b"] for name, run in made.runs.items()}
    neutral, tuned = made.runs["neutral"].original, made.runs["finetune"].original
    forgetful = dataclasses.replace(made, base_original=tuned - 0.5)
    assert forgetful.forgotten("neutral") == pytest.approx((neutral - tuned + 0.5) / 0.5)
    assert dataclasses.replace(made, base_original=tuned + 0.5).forgotten("neutral") is None
    assert abs(rise["neutral"]) < abs(rise["adapter"])
    assert made.runs["neutral"].fired.keys() == made.base_losses.keys()
    assert "| lora | lora |" in page(made)
    written = write_comparison(made, runs, tmp_path / "out")
    assert all(path.stat().st_size for path in written)
    assert json.loads(written[0].read_text())["shares"]["finetune"]["learned"] == 1


def test_comparison_refuses_what_it_cannot_compare(runs, corpus, tmp_path):
    with pytest.raises(BadRequest, match="no source of the target"):
        compare_runs(runs, corpus, ["en.*.heldout.txt"])
    with pytest.raises(BadRequest, match="no source of the base's own language"):
        compare_runs(runs, corpus, ["hu.*.heldout.txt", "en.a.heldout.txt"])
    with pytest.raises(Conflict, match="holds no checkpoint"):
        compare_runs({"none": tmp_path}, corpus, ["*.heldout.txt"])


def test_changes_are_read_as_toml_or_plain_words():
    changes = parse_changes(["run.lr=1e-3", "method=lora", "blocks.h=[16, 0]", "data.chat=false", 'domain="x=y"'])
    assert changes == {"run.lr": 1e-3, "method": "lora", "blocks.h": [16, 0], "data.chat": False, "domain": "x=y"}
    for odd in ("9" * 5000, "[" * 9999 + "]" * 9999):
        assert parse_changes([f"run.tokens={odd}"]) == {"run.tokens": odd}
    with pytest.raises(BadRecipe, match="is not KEY=VALUE"):
        parse_changes(["run.lr"])
