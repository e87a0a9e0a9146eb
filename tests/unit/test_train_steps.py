"""A gradient step is the same however it is cut in parts: its loss, its gradients and what is logged of it."""

import json
import math
from pathlib import Path

import pytest
import torch

from nr_serve.train.batches import Batches
from nr_serve.train.frozen_base import load_base
from nr_serve.train.learner import Learner, StepCounts
from nr_serve.train.losses import next_token_labels
from nr_serve.train.methods import make_learner
from nr_serve.train.recipe import Recipe
from nr_serve.train.run import train
from nr_serve.train.run_text import read_run_text
from nr_serve.train.text import read_classes
from nr_serve.train.trainer import learning_rate
from tests.tiny_run import weights, write_recipe

TRAINED_GATES = {"gate__init": "he", "gate__trained": True}


def learner_of(recipe: Recipe) -> Learner:
    """Random gates, which fire on half of all text, and blocks that add something."""
    learner = make_learner(recipe, load_base(recipe.base))
    g = torch.Generator().manual_seed(0)
    for name, parameter in learner.trained().items():
        if "w_out" in name or "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=g)
    return learner.train()


def gradients(learner: Learner, batches: Batches, step: int) -> tuple[float, dict[str, torch.Tensor]]:
    learner.zero_grad()
    loss = 0.0
    for part in range(batches.parts):
        output = learner(**batches[step * batches.parts + part])["loss"] / batches.parts
        output.backward()
        loss += output.item()
    return loss, {name: p.grad.clone() for name, p in learner.trained().items() if p.grad is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss__lm_on_original": True, "loss__kind": "l1", **TRAINED_GATES},
        {"loss__kind": "cross-entropy", **TRAINED_GATES},
        {"method": "lora"},
    ],
    ids=["neutral", "lm on original", "cross-entropy", "lora"],
)
def test_loss_and_gradients_do_not_depend_on_the_number_of_parts(tmp_path, base, corpus, changes):
    recipe = write_recipe(tmp_path, base, run__background_share=0.25, **changes)
    classes = read_classes(corpus, recipe.data, load_base(str(base)).tokenizer, recipe.run)
    learner = learner_of(recipe)
    whole, expected = gradients(learner, Batches(classes, recipe.run, 1), 1)
    for parts in (2, 4):
        loss, found = gradients(learner, Batches(classes, recipe.run, parts), 1)
        assert loss == pytest.approx(whole, rel=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            scale = expected[name].abs().max()
            assert torch.allclose(gradient / scale, expected[name] / scale, atol=1e-4), (name, parts)


def test_every_part_knows_the_whole_step(tmp_path, base, corpus):
    recipe = write_recipe(tmp_path, base)
    classes = read_classes(corpus, recipe.data, load_base(str(base)).tokenizer, recipe.run)
    cut, uncut = Batches(classes, recipe.run, 4), Batches(classes, recipe.run, 1)
    for step in range(3):
        counts = [cut[step * 4 + part]["step"] for part in range(4)]
        text = {role: tensors for role, tensors in uncut[step].items() if role != "step"}
        labelled = {role: int((next_token_labels(*tensors) != -100).sum()) for role, tensors in text.items()}
        tokens = {role: ids.numel() for role, (ids, _) in text.items()}
        assert counts == [StepCounts(tokens, labelled, 4)] * 4


def steps_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


def test_what_is_logged_of_a_step_does_not_depend_on_the_number_of_parts(tmp_path, base, corpus):
    first = []
    for parts in (1, 4):
        recipe = write_recipe(tmp_path, base, tokens=256, run__accumulate=parts, **TRAINED_GATES)
        train(recipe, tmp_path / str(parts), corpus)
        first.append(steps_of(tmp_path / str(parts))[0])
    for name in ("loss", "lm", "local", "target_fired", "other_fired", "grad_norm"):
        assert first[0][name] == pytest.approx(first[1][name], rel=1e-4), name
    assert first[0]["other_fired"] > 0.01


def test_no_mean_is_logged_of_text_that_was_not_read(tmp_path, base, corpus):
    recipe = write_recipe(tmp_path, base, tokens=512, run__original_share=0.0625, run__background_share=0.0)
    train(recipe, tmp_path / "out", corpus)  # a window of original text in every second step
    assert [("local" in step, "other_fired" in step) for step in steps_of(tmp_path / "out")] == [
        (False, False),
        (True, True),
    ] * 2


def test_what_fired_of_the_target_is_of_the_target_alone(tmp_path, base, corpus):
    sums = {}
    for kind in ("l1", "cross-entropy"):
        for speaks in (False, True):
            changes = {"loss__lm_on_original": speaks, "loss__kind": kind, "run__original_share": 0.25}
            recipe = write_recipe(tmp_path, base, **changes, **TRAINED_GATES)
            classes = read_classes(corpus, recipe.data, load_base(str(base)).tokenizer, recipe.run)
            sums[kind, speaks] = learner_of(recipe)(**Batches(classes, recipe.run, 1)[0])["sums"]
    for name in ("target_fired", "other_fired"):
        fired, seen = zip(*(pairs[name].tolist() for pairs in sums.values()), strict=True)
        assert len(set(fired)) == len(set(seen)) == 1, name
    assert 0 < sums["l1", True]["target_fired"][0] < sums["l1", True]["target_fired"][1] == 5 * 16 * 3
    assert sums["l1", True]["other_fired"][1] == 3 * 16 * 3


@pytest.mark.parametrize(("method", "out"), [("neutral", ".w_out"), ("lora", ".lora_B.")])
def test_what_starts_at_0_alone_learns_faster_by_its_ratio(tmp_path, base, corpus, method, out):
    moved = []
    for ratio in (1.0, 4.0):
        changes = {"run__batch_tokens": 256, "run__out_lr_ratio": ratio, "run__schedule": "constant"}
        recipe = write_recipe(tmp_path, base, tokens=256, method=method, **changes)
        assert recipe.run.steps == 1
        train(recipe, tmp_path / str(ratio), corpus)
        moved.append(weights(tmp_path / str(ratio)))
    slow, fast = moved
    for name in slow:
        assert torch.allclose(fast[name], slow[name] * (4 if out in name else 1), rtol=1e-5), name
    assert any(slow[name].any() for name in slow if out in name)


def adamw(learner: Learner, recipe: Recipe, corpus: Path) -> list[float]:
    """Train in place, by the formulas of AdamW and of clipping, in float64; return each step's gradient norm."""
    run, batches, norms = recipe.run, read_run_text(recipe, corpus).batches, []
    weights = {name: p.detach().double() for name, p in learner.trained().items()}
    means = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(run.steps):
        lr = learning_rate(run, step)
        _, found = gradients(learner, batches, step)
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in found.values())))
        for name, parameter in learner.trained().items():
            gradient = found[name].double() * min(1.0, run.clip / norms[-1])
            means[name] = 0.9 * means[name] + 0.1 * gradient
            squares[name] = 0.999 * squares[name] + 0.001 * gradient.square()
            mean = means[name] / (1 - 0.9 ** (step + 1))
            square = squares[name] / (1 - 0.999 ** (step + 1))
            weights[name] = weights[name] * (1 - lr * run.weight_decay) - lr * mean / (square.sqrt() + 1e-8)
            parameter.data.copy_(weights[name])
    return norms


def test_a_run_takes_the_steps_of_adamw_with_clipped_gradients(tmp_path, base, corpus):
    changes = {"run__weight_decay": 0.5, "run__clip": 0.5, "run__batch_tokens": 256}
    recipe = write_recipe(tmp_path, base, tokens=1024, method="lora", **changes)
    train(recipe, tmp_path / "out", corpus)
    learner = make_learner(recipe, load_base(recipe.base))
    norms = adamw(learner, recipe, corpus)
    assert min(norms) > recipe.run.clip
    assert max(norms) / min(norms) > 1.05, "AdamW does not see a clip that scales all steps alike"
    found = weights(tmp_path / "out")
    for name, expected in learner.trained_state().items():
        assert torch.allclose(found[name], expected, atol=1e-4), name


def test_the_precision_is_the_recipes_whatever_the_launcher_says(tmp_path, base, corpus, monkeypatch):
    for name, precision in (("plain", None), ("launched", "bf16")):
        if precision is not None:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        train(write_recipe(tmp_path, base, tokens=512), tmp_path / name, corpus)
    plain, launched = weights(tmp_path / "plain"), weights(tmp_path / "launched")
    assert all(torch.equal(launched[name], plain[name]) for name in plain)
