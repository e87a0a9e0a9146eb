"""Every method trains from one recipe, and is compared, swept and calibrated from its run's folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from nr_serve.errors import BadRequest, Conflict
from nr_serve.evaluate.compare import compare_runs, page, write_comparison
from nr_serve.evaluate.heldout import evaluate
from nr_serve.neutral.format import read_adapter
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train import trainer as training
from nr_serve.train.base import load_base
from nr_serve.train.calibrate import calibrate
from nr_serve.train.export import export_run, load_run
from nr_serve.train.learner import Learner
from nr_serve.train.loop import Batches, TrainingDiverged
from nr_serve.train.methods import block_parameters, lora_rank, make_learner
from nr_serve.train.recipe import BadRecipe, parse_changes
from nr_serve.train.sweep import read_sweep, run_sweep
from nr_serve.train.text import read_classes
from nr_serve.train.trainer import TrainingStopped, train
from tests.tiny_run import RECIPE, weights, write_recipe

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


def test_every_method_starts_as_the_base_and_equal_methods_train_equally_many_parameters(base):
    ids = torch.arange(40)[None]
    expected = load_base(str(base)).model(ids).logits
    sizes = {}
    for method in METHODS:
        recipe = write_recipe(base.parent, base, method=method)
        frozen = load_base(str(base))
        learner = make_learner(recipe, frozen)
        learner.attached.begin(torch.arange(40)[None])
        assert torch.equal(frozen.model(ids).logits, expected), method
        sizes[method] = sum(p.numel() for p in learner.trained().values())
    assert sizes["neutral"] == sizes["adapter"] == block_parameters(recipe, load_base(str(base)))
    assert sizes["finetune"] == load_base(str(base)).parameters
    one_rank = sizes["lora"] / lora_rank(recipe, load_base(str(base)))
    assert abs(sizes["lora"] - sizes["neutral"]) <= one_rank / 2


def test_a_loras_folder_is_read_by_peft_and_a_finetuned_one_by_transformers(runs, base):
    from peft import PeftModel

    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain(ids).logits
    for method in ("lora", "finetune"):
        _, frozen, learner, _ = load_run(runs[method])
        learner.attached.begin(torch.arange(12)[None])
        expected = frozen.model.eval()(ids).logits
        folder = runs[method] / method
        if method == "lora":
            there = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        else:
            there = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.allclose(there.eval()(ids).logits, expected, atol=1e-4), method
        assert not torch.allclose(before, expected, atol=1e-2), method


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
    with pytest.raises(BadRequest, match=f"only relu gates are served, not {kind}"):
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


def test_training_stops_when_the_targets_loss_no_longer_falls_and_keeps_the_best(
    tmp_path, base, corpus, monkeypatch
):
    seen = []

    def worse(run, step):
        seen.append((step, weights_now(run.learner)))
        return float(len(seen))

    monkeypatch.setattr(training.TrainingRun, "validate", worse)
    recipe = write_recipe(tmp_path, base, tokens=12800, run__patience=2, run__validate_every=256)
    train(recipe, tmp_path / "out", corpus)
    steps = [step for step, _ in seen]
    assert steps == [0, 2, 4, 6, 6]  # best at the first measurement while training, then two worse ones
    best, last = seen[1][1], seen[-1][1]
    assert all(torch.equal(best[name], last[name]) for name in best)


def test_patience_without_the_targets_held_out_text_is_refused(tmp_path, base, corpus):
    recipe = write_recipe(tmp_path, base, run__patience=1, data__heldout=["en.*.heldout.txt"])
    with pytest.raises(BadRecipe, match=r"run\.patience watches"):
        train(recipe, tmp_path / "out", corpus)


def weights_now(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.trained_state().items()}


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("No space left"),
        RuntimeError("write failed: No space"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_told_and_the_last_good_checkpoint_kept(tmp_path, base, corpus, monkeypatch, error):
    save, calls = checkpoints.save_weights, []

    def full(folder, tensors):
        calls.append(folder)
        if len(calls) > 1:
            raise error
        save(folder, tensors)

    monkeypatch.setattr(checkpoints, "save_weights", full)
    out = tmp_path / "out"
    with pytest.raises(TrainingStopped, match=r"No space.*; the last good checkpoint is .*checkpoint-2"):
        train(write_recipe(tmp_path, base), out, corpus)
    monkeypatch.undo()
    train(write_recipe(tmp_path, base), out, corpus, resume=True)
    train(write_recipe(tmp_path, base), tmp_path / "whole", corpus)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(out).values(), weights(tmp_path / "whole").values(), strict=True)
    )


def test_comparison_shares_follow_their_definition(runs, corpus, tmp_path):
    made = compare_runs(runs, corpus, ["hu.*.heldout.txt", "en.*.heldout.txt"], windows=4)
    assert made.target_sources == ("hu.a",)
    assert made.original_sources == ("en.b",)
    assert made.learned("finetune") == 1
    base_t, ft_t = made.base_losses["hu.a"], made.runs["finetune"].losses["hu.a"]
    assert made.learned("lora") == pytest.approx((base_t - made.runs["lora"].losses["hu.a"]) / (base_t - ft_t))
    rise = {name: run.losses["en.b"] - made.base_losses["en.b"] for name, run in made.runs.items()}
    if rise["finetune"] > 0:
        assert made.forgotten("neutral") == pytest.approx(rise["neutral"] / rise["finetune"])
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


def write_sweep(folder: Path, base: Path, runs: str) -> Path:
    (folder / "recipe.toml").write_text(RECIPE.format(base=base, tokens=512, lr=0.01, gate=""))
    path = folder / "sweep.toml"
    path.write_text(f'recipe = "recipe.toml"\n[set]\n"run.seed" = 3\n{runs}')
    return path


def test_a_sweep_trains_each_run_once_with_its_changes(tmp_path, base, corpus, capsys):
    path = write_sweep(
        tmp_path,
        base,
        '[runs.a]\n[runs.b]\n"method" = "lora"\n[runs.bad]\n"method" = "finetune"\n"run.lr" = 1e30\n'
        '[runs.c]\n"blocks.capacity" = 0.1\n',
    )
    recipes = read_sweep(path)
    assert [(r.run.seed, r.method, r.blocks.h) for r in recipes.values()] == [
        (3, "neutral", 16), (3, "lora", 16), (3, "finetune", 16), (3, "neutral", None)
    ]  # fmt: skip
    results = run_sweep(path, tmp_path / "out", corpus)
    assert isinstance(results["bad"], TrainingDiverged)
    assert [isinstance(results[name], Path) for name in "abc"] == [True] * 3
    stamps = {name: results[name].stat().st_mtime_ns for name in "abc"}
    again = run_sweep(path, tmp_path / "out", corpus)
    assert {name: again[name].stat().st_mtime_ns for name in "abc"} == stamps


def test_changes_from_outside_come_last_in_every_run(tmp_path, base):
    path = write_sweep(tmp_path, base, '[runs.a]\n[runs.b]\n"run.lr" = 0.5\n')
    recipes = read_sweep(path, {"run.lr": 0.25, "run.seed": 9})
    assert [(r.run.lr, r.run.seed) for r in recipes.values()] == [(0.25, 9)] * 2


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("", "runs"),
        ('[runs.a]\n"run.tokenz" = 5\n', "run a: recipe.toml: run.tokenz is not a known key"),
        ('[runs.a]\n"method" = "magic"\n', "run a: recipe.toml: method"),
        ('[runs.a]\n"domain.x" = 1\n', "domain is not a section"),
    ],
)
def test_a_wrong_sweep_names_the_run_and_the_key(tmp_path, base, runs, message):
    with pytest.raises(BadRecipe, match=message):
        read_sweep(write_sweep(tmp_path, base, runs))


def test_changes_are_read_as_toml_or_plain_words():
    changes = parse_changes(["run.lr=1e-3", "method=lora", "blocks.h=[16, 0]", "data.chat=false", 'domain="x=y"'])
    assert changes == {"run.lr": 1e-3, "method": "lora", "blocks.h": [16, 0], "data.chat": False, "domain": "x=y"}
    with pytest.raises(BadRecipe, match="is not KEY=VALUE"):
        parse_changes(["run.lr"])


def test_calibration_moves_only_the_gates_and_shuts_them_on_a_neighbours_text(tmp_path, base, corpus):
    wide = {"tokens": 5120, "lr": 0.03, "data__background": [], "run__background_share": 0.0}
    old = train(write_recipe(tmp_path, base, **wide), tmp_path / "hu", corpus)
    changes = {"domain": "da", "data__target": ["da.*.train.txt"], "data__background": ["hu.a.train.txt"]}
    neighbour = train(write_recipe(tmp_path, base, **changes), tmp_path / "da", corpus)
    new = calibrate(old, [neighbour], corpus, tmp_path / "new.safetensors", base=str(base), carry=0.25)
    before, after = read_adapter(old), read_adapter(new)
    assert after.version != before.version
    assert (after.info.carry, after.info.threshold, after.info.recipe["blocks"]["carry"]) == (0.25, 0, 0.25)
    assert after.info.recipe["data"]["background"] == ["da.a.train.txt"]
    assert after.info.results["calibrated"]["beside"] == {"da": read_adapter(neighbour).version}
    for a, b in zip(before.blocks, after.blocks, strict=True):
        assert torch.equal(a.w_in, b.w_in)
        assert torch.equal(a.w_gate, b.w_gate)
        assert torch.equal(a.w_out, b.w_out)
        assert not torch.equal(a.gate, b.gate)
    fired = {}
    for file in (old, new):
        report = evaluate([file, neighbour], str(base), corpus, ["da.*.heldout.txt", "hu.*.heldout.txt"], window=16)
        fired[file] = {source: report.sources[source].fired[file.stem] for source in report.sources}
    assert fired[old]["da.a"] > 0.2
    assert fired[new]["da.a"] < 0.1
    assert fired[new]["hu.a"] > 0.5


def test_calibration_needs_the_adapters_recipe(tmp_path, base, corpus):
    from nr_serve.neutral.format import write_adapter
    from tests import tiny

    model = tiny.model()
    made = tiny.adapter(model, 3)
    write_adapter(tmp_path / "x.safetensors", made.info, made.blocks)
    with pytest.raises(BadRequest, match="x carries no recipe"):
        calibrate(tmp_path / "x.safetensors", [], corpus, tmp_path / "y.safetensors", base=str(base))
    assert not (tmp_path / "y.safetensors").exists()
