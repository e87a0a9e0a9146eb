"""The demo and the measurements: those of a server as far as they go without one, the others on a tiny base."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from nr_serve.train import checkpoint as checkpoints
from nr_serve.train.attach import Attached
from nr_serve.train.blocks import AdapterModule
from nr_serve.train.frozen_base import load_base
from nr_serve.train.gates import fit_gates
from nr_serve.train.measure import measure
from nr_serve.train.recipe import BadRecipe, Gate
from nr_serve.train.run import train
from nr_serve.train.text import read_classes
from nr_serve.train.text.lead_in import GateText
from nr_serve.train.text.pack import Windows
from tests import tiny
from tests.fakes import serving
from tests.tiny_run import write_recipe

ROOT = Path(__file__).parents[2]


def load(path: str):
    """A script as a module; as when it is run, it finds the files beside it."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with mock.patch.object(sys, "path", [str(file.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


def test_neutrality_is_measured_with_an_adapter_loaded(tmp_path, capsys):
    (tmp_path / "en.x.heldout.txt").write_text("one two three four five\nsix\n")
    asked = ["--corpus", str(tmp_path), "--source", "en.x", "--prompts", "1", "--words", "3", "--tokens", "2"]
    with serving() as server:
        load("loadtests/neutrality.py").main(["--url", server.url, *asked])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["prompts"], result["equal"], result["fired"]) == (1, 1, {"hu": 0.5})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_demo_ends_if_its_stream_does():
    with serving() as server, pytest.raises(SystemExit, match="stream ended"):
        load("examples/demo.py").load_beside_a_stream(server.url, "no such model")


def test_the_demos_commands_ask_its_own_server(monkeypatch):
    monkeypatch.setenv("NR_URL", "http://127.0.0.1:9")
    demo, seen = load("examples/demo.py"), []
    monkeypatch.setattr(
        demo, "subprocess", SimpleNamespace(run=lambda args, check, env: seen.append(env["NR_URL"]))
    )
    demo.run("http://127.0.0.1:1", "list-adapters")
    assert seen == ["http://127.0.0.1:1"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    """Tokens are not kept in the user's own cache."""
    monkeypatch.setenv("NR_CACHE", str(tmp_path_factory.mktemp("cache")))


SOURCES = {
    "en.a": "the ", "en.b": "and ", "en.c": "of a", "en.d": "in t", "hu.a": "őűáé", "hu.b": "őűíé", "da.a": "æøåe",
    "sv.a": "äöåe", "fi.a": "äöyk", "cs.a": "řěšk", "pl.a": "łśżk", "el.a": "αβγδ",
}  # fmt: skip
"""Each source's letters."""


@pytest.fixture(scope="module")
def languages(tmp_path_factory) -> Path:
    """A corpus of eight made-up languages."""
    folder = tmp_path_factory.mktemp("languages")
    for i, (source, letters) in enumerate(SOURCES.items()):
        for j, part in enumerate(("train", "heldout")):
            picks = torch.randint(0, 4, (40, 40), generator=torch.Generator().manual_seed(2 * i + j)).tolist()
            text = "\n\n".join("".join(letters[k] for k in row) for row in picks)
            (folder / f"{source}.{part}.txt").write_text(text, encoding="utf-8")
    return folder


def asked(base: Path, languages: Path, *more: str) -> list[str]:
    text = ["--model", str(base), "--corpus", str(languages), "--target", "hu", "--tokens", "256", "--window", "16"]
    return [*text, "--kept-out", "el", "--unfitted", "en.d", "--layers", "2", *more]


def test_the_gate_study_varies_one_thing_at_a_time_and_draws_it(base, languages, tmp_path, capsys):
    grid = ["--carry", "0", "0.5", "--percentile", "90", "99", "--background", "0", "2", "9", "--relative", "da"]
    load("loadtests/gates.py").main(asked(base, languages, *grid, "--plots", str(tmp_path)))
    *shown, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    keys = ("solver", "carry", "background", "percentile")
    settings = [tuple(row[key] for key in keys) for row in result["rows"]]
    assert settings[0] == ("logistic", 0.5, 5, 99.0)
    assert sorted(settings[1:]) == [
        ("closed-form", 0.0, 5, 99.0),
        ("closed-form", 0.5, 5, 99.0),
        ("logistic", 0.0, 5, 99.0),
        ("logistic", 0.5, 0, 99.0),
        ("logistic", 0.5, 2, 99.0),
        ("logistic", 0.5, 4, 99.0),
        ("logistic", 0.5, 5, 90.0),
    ]
    assert [row["relative"] for row in result["rows"]] == [row["background"] == 5 for row in result["rows"]]
    classes = {"en.a", "en.b", "en.c", "en.d", "da", "sv", "fi", "cs", "pl", "el"}
    assert all(set(row["leak"]) == classes for row in result["rows"])
    assert len(shown) == 2 + len(settings) + 1 + 2 + len(classes)
    assert [path.name for path in tmp_path.iterdir()] == ["gates-hu.svg"]
    assert (result["layers"], result["plan"]["kept_out"], result["plan"]["unfitted"]) == ([0, 2], ["el"], ["en.d"])
    assert result["plan"]["background"][-1] == "da"
    assert set(result["plan"]["background"]) == {"da", "sv", "fi", "cs", "pl"}
    assert result["tokens"]["fit"] == {n: 1024 if n == "hu" else 256 for n in result["tokens"]["fit"]}
    assert {"el", "en.d"} & set(result["tokens"]["fit"]) == set()
    assert result["command"].startswith("python loadtests/gates.py --model")
    assert result["machine"]["cores"] > 0


def test_the_gate_study_finds_what_the_gates_of_training_find(base, languages, tmp_path):
    """One layer, so that the stream is the frozen one in training too."""
    gates = load("loadtests/gates.py")
    args = gates._parse(asked(base, languages))
    plan, frozen = gates.make_plan(languages, args), load_base(str(base))
    text = gates.read_text(languages, frozen.tokenizer, plan, 16, 256)
    windows = text.windows()
    stream = gates.Stream(tmp_path, [0], windows, tiny.D)
    stream.fill(frozen.model)

    for init, percentile in (("closed-form", 90), ("logistic", 80)):
        frozen = load_base(str(base))  # hosted once
        attached = Attached(frozen.model, [AdapterModule.fresh([16] * tiny.LAYERS, tiny.D, 0.5, seed=0)])
        fitted = {"target": GateText.whole(windows.take(text.fit["hu"].rows))}
        fitted |= {n: GateText.whole(windows.take(text.fit[n].rows)) for n in plan.fitted(2)}
        gate = Gate(init=init, percentile=percentile, background_percentile=percentile)
        fit_gates(frozen.model, attached, fitted, gate)
        held = {n: windows.take(each.rows) for n, each in text.report.items()}
        expected = {n: r.fired_by_layer[0][0] for n, r in measure(frozen.model, attached, held).items()}
        setting = gates.Setting(init, 0.5, 2, percentile)
        shares = gates.fit(stream, text, plan, setting, gate.ridge, 0)
        assert shares == pytest.approx(expected, abs=0.02)
        assert len(set(shares.values())) > 4


def test_the_kept_stream_is_the_ffns_inputs(base, tmp_path):
    gates = load("loadtests/gates.py")
    ids_NT = torch.randint(0, 256, (20, 16), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids_NT, torch.arange(16).expand(20, 16))
    seen = []
    plain = load_base(str(base)).model
    plain.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain(ids_NT)
    stream = gates.Stream(tmp_path, [0, 1], windows, tiny.D)
    stream.fill(load_base(str(base)).model)
    kept = stream.rows(1, [slice(18, 20), slice(0, 3)])
    expected = torch.cat([seen[0][18:20], seen[0][0:3]]).flatten(0, 1)
    assert torch.allclose(kept, expected, atol=1e-2, rtol=1e-3)


def test_a_larger_background_holds_the_smaller_one_and_never_what_is_kept_out(languages):
    gates = load("loadtests/gates.py")
    common = ["--corpus", str(languages), "--target", "hu", "--relative", "fi"]
    plan = gates.make_plan(languages, gates._parse([*common, "--seed", "3"]))
    assert plan == gates.make_plan(languages, gates._parse([*common, "--seed", "3"]))
    assert len(plan.kept_out) == 1
    assert len(plan.unfitted) == 2
    assert {*plan.original, *plan.unfitted} == {"en.a", "en.b", "en.c", "en.d"}
    nested = [plan.fitted(size) for size in range(6)]
    assert all(larger[: len(smaller)] == smaller for smaller, larger in itertools.pairwise(nested))
    assert not {"hu", *plan.kept_out, *plan.unfitted} & set(nested[-1])
    assert set(nested[0]) == set(plan.original)
    assert "fi" not in plan.fitted(plan.unrelated)
    assert "fi" in plan.fitted(plan.unrelated + 1)
    with pytest.raises(SystemExit, match=r"xx, en\.z"):
        gates.make_plan(languages, gates._parse([*common, "--kept-out", "xx", "--unfitted", "en.z"]))
    with pytest.raises(SystemExit, match="named for two parts"):
        gates.make_plan(languages, gates._parse([*common, "--kept-out", "fi"]))


def test_the_worst_and_the_mean_are_over_the_layers_mean_of_each_class():
    gates = load("loadtests/gates.py")
    plan = gates.Plan("hu", ["sv", "da"], ["da"], ["el", "fi"], ["en.a"], ["en.d"])
    layers = [
        {"hu": 0.9, "sv": 0.4, "da": 0.6, "el": 0.0, "fi": 0.1, "en.a": 0.0, "en.d": 0.3},
        {"hu": 0.7, "sv": 0.0, "da": 0.8, "el": 0.3, "fi": 0.1, "en.a": 0.1, "en.d": 0.1},
    ]
    (row,) = gates.summarise({gates.Setting("logistic", 0.5, 1, 99.5): layers}, plan)
    assert (row["found"], row["relative"]) == (pytest.approx(0.8), False)
    assert row["leak"] == pytest.approx({"sv": 0.2, "da": 0.7, "el": 0.15, "fi": 0.1, "en.a": 0.05, "en.d": 0.2})
    assert row["fitted"] == {"worst": pytest.approx(0.2), "worst_on": "sv", "mean": pytest.approx(0.125)}
    assert row["unfitted"] == {"worst": pytest.approx(0.2), "worst_on": "en.d", "mean": pytest.approx(0.2)}
    assert row["kept_out"] == {"worst": pytest.approx(0.15), "worst_on": "el", "mean": pytest.approx(0.125)}
    assert row["relatives"]["worst"] == pytest.approx(0.7)


METHODS = ["neutral", "adapter", "lora", "finetune"]


def test_training_speed_is_measured_in_rounds_of_equal_methods(base, corpus, tmp_path, monkeypatch, capsys):
    training = load("loadtests/training.py")
    write_recipe(tmp_path, base)
    taken, step = [], training.Runner.step
    monkeypatch.setattr(
        training.Runner, "step", lambda r, parts: (taken.append((len(r.seconds), r.recipe.method)), step(r, parts))
    )
    flags = ["--corpus", str(corpus), "--steps", "3", "--warmup", "1", "--tokens", "256", "--fit-tokens", "512"]
    training.main([str(tmp_path / "recipe.toml"), *flags])
    *shown, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert taken == [(n, method) for n in range(4) for method in METHODS]
    sizes = {method: m["parameters"] for method, m in result["methods"].items()}
    assert sizes["neutral"] == sizes["adapter"]
    assert sizes["lora"] == pytest.approx(sizes["neutral"], rel=0.1)
    assert sizes["finetune"] == load_base(str(base)).parameters
    assert result["methods"]["lora"]["speed_to_lora"] == 1
    assert 0.9 < result["methods"]["adapter"]["target_fired"] < 1, "all but texts' first tokens"
    assert 0 < result["methods"]["neutral"]["target_fired"] <= 1
    for m in result["methods"].values():
        rates, seconds = m["rounds"]["tokens_a_second"], m["rounds"]["seconds"]
        assert [r * s for r, s in zip(rates, seconds, strict=True)] == [pytest.approx(256)] * 3
    assert len(shown) == 2 + len(METHODS)
    assert result["command"].startswith("python loadtests/training.py")


@pytest.mark.parametrize("method", ["neutral", "lora"])
def test_a_measured_step_is_a_step_of_training(base, corpus, tmp_path, method):
    recipe = write_recipe(tmp_path, base, tokens=256, method=method, run__accumulate=2, run__original_share=0.25)
    train(recipe, tmp_path / "out", corpus)
    expected = checkpoints.load(checkpoints.latest(tmp_path / "out")).weights()
    training = load("loadtests/training.py")
    classes = read_classes(corpus, recipe.data, load_base(str(base)).tokenizer, recipe.run)
    runner = training.make_runner(recipe, classes, recipe.gate.fit_tokens)
    for number in range(2):
        runner.step(number)
    got = runner.learner.trained_state()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, atol=1e-5), name


def test_ratios_to_lora_are_medians_over_rounds_after_the_warm_up():
    training = load("loadtests/training.py")

    def runner(rates: list[float], seconds: list[float]):
        return SimpleNamespace(parameters=1, rates=rates, seconds=seconds, fired=[0.0] * len(rates))

    runners = {"neutral": runner([1, 10, 30, 9], [9, 2, 1, 2]), "lora": runner([7, 10, 10, 10], [1, 3, 3, 3])}
    measured = training.summarise(runners, warmup=1)["neutral"]
    assert (measured["tokens_a_second"], measured["seconds_a_step"]) == (10, 2)
    assert measured["speed_to_lora"] == 1
    assert training.summarise({"neutral": runners["neutral"]}, 1)["neutral"]["speed_to_lora"] is None


def test_what_is_not_measured_is_refused(base, corpus, tmp_path):
    recipe = write_recipe(tmp_path, base)
    path = tmp_path / "recipe.toml"
    path.write_text(path.read_text() + "compile = true\n")
    with pytest.raises(BadRecipe, match="compile"):
        load("loadtests/training.py").main([str(path), "--corpus", str(corpus)])
    assert not recipe.run.compile


def test_a_measurement_says_which_commit_and_command_it_comes_from():
    provenance = load("loadtests/provenance.py")
    made = provenance.provenance("/anywhere/loadtests/gates.py", ["--corpus", "my text"])
    assert made["command"] == "python loadtests/gates.py --corpus 'my text'"
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    assert ("avx512_bf16" in made["machine"]["extensions"]) == ("avx512_bf16" in flags)
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert head.stdout.startswith(made["commit"].removesuffix("-dirty"))
    else:
        assert made["commit"] is None
