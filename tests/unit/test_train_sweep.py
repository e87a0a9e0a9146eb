"""Sweeps: each run is trained once with its changes, whatever becomes of the others."""

import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from nr_serve.cli import main
from nr_serve.errors import Conflict
from nr_serve.train import export, run
from nr_serve.train.recipe import BadRecipe
from nr_serve.train.sweep import finished, read_sweep, run_sweep
from nr_serve.train.trainer import TrainingDiverged
from tests.tiny_run import write_sweep


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
    results = run_sweep(read_sweep(path), tmp_path / "out", corpus)
    assert isinstance(results["bad"], TrainingDiverged)
    assert [isinstance(results[name], Path) for name in "abc"] == [True] * 3
    stamps = {name: results[name].stat().st_mtime_ns for name in "abc"}
    again = run_sweep(read_sweep(path), tmp_path / "out", corpus)
    assert {name: again[name].stat().st_mtime_ns for name in "abc"} == stamps
    (results["b"] / "adapter_model.safetensors").unlink()
    run_sweep({"b": recipes["b"]}, tmp_path / "out", corpus)
    assert (results["b"] / "adapter_model.safetensors").exists()


def test_a_sweep_does_not_go_on_with_other_text_than_its_finished_runs_learned(tmp_path, base, corpus, monkeypatch):
    text, out = shutil.copytree(corpus, tmp_path / "corpus"), tmp_path / "out"
    path = write_sweep(tmp_path, base, '[runs.a]\n"method" = "lora"\n[runs.b]\n[runs.c]\n')
    recipes = read_sweep(path)
    run_sweep({name: recipes[name] for name in "ab"}, out, text)
    monkeypatch.setattr(run, "train", lambda *_, **__: pytest.fail("it trained"))
    for name in ("hu.a.train.txt", "da.a.heldout.txt"):
        kept = (text / name).read_text()
        (text / name).write_text(kept[: len(kept) // 2])
        with pytest.raises(Conflict, match="corpus differs from that of finished runs, a, b; name another folder"):
            run_sweep(recipes, out, text)
        (text / name).write_text(kept)


def test_changes_from_outside_come_last_in_every_run(tmp_path, base):
    path = write_sweep(tmp_path, base, '[runs.a]\n[runs.b]\n"run.lr" = 0.5\n')
    recipes = read_sweep(path, {"run.lr": 0.25, "run.seed": 9})
    assert [(r.run.lr, r.run.seed) for r in recipes.values()] == [(0.25, 9)] * 2
    path.write_text('recipe = "recipe.toml"\n[set]\n"blocks.h" = 32\n[runs.a]\n"blocks.capacity" = 0.1\n')
    assert read_sweep(path)["a"].blocks.capacity == 0.1
    assert read_sweep(path, {"blocks.h": 64})["a"].blocks.h == 64


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("", "runs"),
        ('[runs.a]\n"run.tokenz" = 5\n', "run a: a recipe has no key 'run.tokenz'"),
        ('[runs.a]\n"method" = "magic"\n', "run a: recipe.toml: method"),
        ('[runs.a]\n"domain.x" = 1\n', "a recipe has no key 'domain.x'; did you mean domain"),
        ('[runs."../a"]\n', r"runs\.\.\./a.*should match"),
        ('[runs."."]\n', "should match"),
        ('[runs."a\\u0000"]\n', "should match"),
        ('[runs."comparison.json"]\n', "the comparison's files are named so"),
    ],
)
def test_a_wrong_sweep_names_the_run_and_the_key(tmp_path, base, runs, message):
    with pytest.raises(BadRecipe, match=message):
        read_sweep(write_sweep(tmp_path, base, runs))


def test_a_run_that_breaks_is_told_at_the_end_and_does_not_stop_the_others(
    tmp_path, base, corpus, monkeypatch, capsys
):
    train = run.train
    models = []

    def breaks(recipe, out, *args, **more):
        if out.name == "a":
            model = torch.nn.Linear(1, 1)
            models.append(weakref.ref(model))
            try:
                raise OSError("no space")
            except OSError as error:
                raise ZeroDivisionError("of our own making") from error
        return train(recipe, out, *args, **more)

    monkeypatch.setattr(run, "train", breaks)
    path = write_sweep(tmp_path, base, '[runs.a]\n[runs.b]\n"run.seed" = 4\n')
    results = run_sweep(read_sweep(path), tmp_path / "out", corpus)
    assert isinstance(results["a"], ZeroDivisionError)
    gc.collect()
    assert models[0]() is None, "what failed is kept, its model is not"
    assert results["b"].exists()
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1] == "sweep: a failed: ZeroDivisionError('of our own making')"
    monkeypatch.setattr("nr_serve.evaluate.compare.compare_runs", lambda *_, **__: None)
    monkeypatch.setattr("nr_serve.evaluate.compare.write_comparison", lambda *_: [])
    assert main(["sweep", str(path), "--corpus", str(corpus), "--out", str(tmp_path / "out")]) == 1


def test_a_sweep_can_be_stopped_by_hand(tmp_path, base, corpus, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(read_sweep(write_sweep(tmp_path, base, "[runs.a]\n[runs.b]\n")), tmp_path / "out", corpus)


def test_a_result_half_written_is_not_one(tmp_path, base, corpus, monkeypatch):
    path = write_sweep(tmp_path, base, '[runs.a]\n"method" = "lora"\n')
    (recipe,) = read_sweep(path).values()
    save = export.save_lora

    def killed(folder, base):
        save(folder, base)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_lora", killed)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(read_sweep(path), tmp_path / "out", corpus)
    assert finished(tmp_path / "out" / "a", recipe) is None
    made = run_sweep(read_sweep(path), tmp_path / "out", corpus)["a"]
    assert {"adapter_model.safetensors", "tokenizer.json"} <= {file.name for file in made.iterdir()}
    assert not list(made.parent.glob(".lora*"))
    stale = shutil.copy(made / "tokenizer.json", made / "stale.json")
    run.train(recipe, made.parent, corpus, resume=True)
    assert not Path(stale).exists()


def test_runs_of_several_domains_are_trained_and_not_compared(tmp_path, base, corpus, capsys):
    path = write_sweep(tmp_path, base, '[runs.a]\n[runs.b]\n"domain" = "other"\n')
    asked = ["sweep", str(path), "--corpus", str(corpus), "--out", str(tmp_path / "out")]
    for flag, value in (("--source", "*.heldout.txt"), ("--windows", "12")):
        assert main([*asked, flag, value]) == 1
        said = capsys.readouterr().err
        assert f"runs of several domains or bases are not compared: {flag} does nothing" in said
    assert not (tmp_path / "out").exists()
    assert main(asked) == 0
    names = [str(tmp_path / "out" / name) for name in ("a/hu.safetensors", "b/other.safetensors")]
    assert capsys.readouterr().out.splitlines() == names


def test_a_sweep_that_could_not_be_compared_is_refused_before(tmp_path, base, corpus, monkeypatch, capsys):
    path = write_sweep(tmp_path, base, "[runs.a]\n")
    monkeypatch.setattr(run, "train", lambda *_, **__: pytest.fail("it trained"))
    out = tmp_path / "out"
    assert (
        main(["sweep", str(path), "--corpus", str(corpus), "--out", str(out), "--source", "hu.*.heldout.txt"]) == 1
    )
    assert "no source of the base's own language, unread by every run," in capsys.readouterr().err
    assert not out.exists()
