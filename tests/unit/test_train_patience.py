"""Early stopping: the best weights are the run's, for whoever reads them, and a stopped run is at its end."""

import itertools

import pytest
import torch

from nr_serve.neutral.format import read_adapter
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train import run as training
from nr_serve.train import trainer
from nr_serve.train.export import export_run
from nr_serve.train.recipe import BadRecipe, Recipe
from nr_serve.train.restore import load_run
from nr_serve.train.run import train
from nr_serve.train.sweep import finished, read_sweep, run_sweep
from tests.tiny_run import RECIPE, killed_before, write_recipe

Seen = list[tuple[int, dict[str, torch.Tensor]]]


@pytest.fixture
def worsening(monkeypatch) -> Seen:
    """Every measurement is worse than the one before; what was measured, at which step."""
    seen: Seen = []

    def worse(run, step):
        seen.append((step, {name: t.clone() for name, t in run.learner.trained_state().items()}))
        run.results = {"hu.a": {"before": 1.0, "after": float(len(seen))}}
        run._measured = step
        return float(len(seen))

    monkeypatch.setattr(training.TrainingRun, "_measure", worse)
    return seen


def patient(tmp_path, base, patience: int = 2, refit: bool = False) -> Recipe:
    changes = {"run__patience": patience, "run__validate_every": 256, "gate__refit": refit}
    return write_recipe(tmp_path, base, tokens=12800, **changes)


def test_training_stops_when_the_targets_loss_no_longer_falls_and_keeps_the_best(tmp_path, base, corpus, worsening):
    path = train(patient(tmp_path, base), tmp_path / "out", corpus)
    assert [step for step, _ in worsening] == [0, 2, 4, 6]  # best at the first one while training, then two worse
    best, last = worsening[1][1]["adapter.layers.0.w_out"], worsening[-1][1]["adapter.layers.0.w_out"]
    assert not torch.equal(best, last)
    made = read_adapter(path)
    assert torch.equal(made.blocks[0].w_out, best.bfloat16())
    assert made.info.results == {"tokens": 2 * 128, "heldout": {"hu.a": {"before": 1.0, "after": 2.0}}}


def test_the_best_weights_gates_are_fitted_again(tmp_path, base, corpus, worsening):
    path = train(patient(tmp_path, base, refit=True), tmp_path / "out", corpus)
    assert [step for step, _ in worsening] == [0, 2, 4, 6, 2]
    best, made = worsening[1][1], read_adapter(path)
    for i, block in enumerate(made.blocks):
        assert torch.equal(block.w_out, best[f"adapter.layers.{i}.w_out"].bfloat16())
        assert torch.equal(block.gate, best[f"adapter.layers.{i}.gate"]) == (i == 0)
    assert made.info.results == {"tokens": 2 * 128, "heldout": {"hu.a": {"before": 1.0, "after": 5.0}}}


def test_exports_and_comparisons_take_the_best_checkpoint(tmp_path, base, corpus, worsening):
    out = tmp_path / "out"
    path = train(patient(tmp_path, base, patience=3), out, corpus)
    assert checkpoints.load(checkpoints.latest(out)).step == 8
    _, _, learner, saved = load_run(out)
    assert saved.step == 2
    assert all(torch.equal(learner.trained_state()[name], best) for name, best in worsening[1][1].items())
    exported = read_adapter(export_run(out, tmp_path / "x.safetensors"))
    assert exported.info.results == read_adapter(path).info.results


def test_how_long_the_loss_has_not_fallen_survives_a_kill(tmp_path, base, corpus, worsening, monkeypatch):
    recipe = patient(tmp_path, base, patience=3)
    with killed_before(6, monkeypatch), pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "out", corpus)
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    made = train(recipe, moved, corpus, resume=True)
    assert [step for step, _ in worsening] == [0, 2, 4, 6, 8]
    assert read_adapter(made).info.results["tokens"] == 2 * 128


def test_a_stopped_run_takes_no_further_step(tmp_path, base, corpus, worsening, monkeypatch):
    recipe, out = patient(tmp_path, base), tmp_path / "out"
    made = train(recipe, out, corpus)
    before = read_adapter(made)
    made.unlink()
    assert finished(out, recipe) is None
    monkeypatch.setattr(trainer.RunTrainer, "compute_loss", lambda *_, **__: pytest.fail("a step"))
    again = read_adapter(train(recipe, out, corpus, resume=True))
    assert again.info == before.info
    assert all(torch.equal(a.w_out, b.w_out) for a, b in zip(again.blocks, before.blocks, strict=True))
    assert finished(out, recipe) == made


def test_a_sweep_sees_a_stopped_run_as_finished(tmp_path, base, corpus, worsening, monkeypatch):
    (tmp_path / "recipe.toml").write_text(RECIPE.format(base=base, tokens=12800, lr=0.01, gate=""))
    path = tmp_path / "sweep.toml"
    path.write_text('recipe = "recipe.toml"\n[runs.a]\n"run.patience" = 1\n"run.validate_every" = 256\n')
    first = run_sweep(read_sweep(path), tmp_path / "out", corpus)
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run_sweep(read_sweep(path), tmp_path / "out", corpus) == first


def test_a_run_that_ends_before_its_first_measurement_keeps_what_it_has(tmp_path, base, corpus):
    recipe = write_recipe(tmp_path, base, tokens=256, run__patience=1)
    made = read_adapter(train(recipe, tmp_path / "out", corpus))
    assert made.info.results["tokens"] == 256
    assert made.info.results["heldout"]["hu.a"]["after"] != made.info.results["heldout"]["hu.a"]["before"]


def test_patience_without_the_targets_held_out_text_is_refused(tmp_path, base, corpus):
    recipe = write_recipe(tmp_path, base, run__patience=1, data__heldout=["en.*.heldout.txt"])
    with pytest.raises(BadRecipe, match=r"run\.patience watches"):
        train(recipe, tmp_path / "out", corpus)


def test_the_best_checkpoint_outlives_the_rotation(tmp_path, base, corpus, worsening):
    train(patient(tmp_path, base, patience=4), tmp_path / "out", corpus)
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert steps == [2, 8, 10]
    assert all(a < b for a, b in itertools.pairwise(step for step, _ in worsening))
