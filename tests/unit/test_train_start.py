"""Training that goes on from an adapter file."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nr_serve.errors import BadAdapterFile, Conflict
from nr_serve.neutral.format import read_adapter, write_adapter
from nr_serve.train import log
from nr_serve.train import run as training
from nr_serve.train.export import export_run
from nr_serve.train.recipe import BadRecipe
from nr_serve.train.run import train
from nr_serve.train.sweep import finished
from tests.tiny_run import write_recipe


@pytest.fixture(scope="module")
def first(tmp_path_factory, base, corpus):
    """An adapter that was trained before."""
    folder = tmp_path_factory.mktemp("first")
    return train(write_recipe(folder, base), folder / "run", corpus)


def heldout(out) -> list[dict[str, dict[str, float]]]:
    return [entry["sources"] for entry in log.read(out / "log.jsonl") if entry["event"] == "heldout"]


def test_training_begins_with_the_blocks_and_gates_of_the_file(tmp_path, base, corpus, first, monkeypatch):
    def fitted(*_):
        raise AssertionError("its gates are fitted already")

    monkeypatch.setattr(training, "fit_once", fitted)
    still = write_recipe(tmp_path, base, tokens=128, lr=1e-12, blocks__start=str(first), gate__refit=False)
    kept = read_adapter(train(still, tmp_path / "still", corpus))
    for ours, theirs in zip(kept.blocks, read_adapter(first).blocks, strict=True):
        for name in ("gate", "bias", "w_in", "w_gate", "w_out"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    before = heldout(first.parent)[-1]
    assert heldout(tmp_path / "still")[0] == {
        name: {"before": pytest.approx(each["after"], abs=1e-2), "after": pytest.approx(each["after"], abs=1e-2)}
        | {"fired": pytest.approx(each["fired"], abs=0.02)}
        for name, each in before.items()
    }

    on = write_recipe(tmp_path, base, lr=0.03, blocks__start=str(first))
    made = read_adapter(train(on, tmp_path / "on", corpus))
    assert heldout(tmp_path / "on")[-1]["hu.a"]["after"] < before["hu.a"]["after"]
    assert not torch.equal(made.blocks[-1].gate, read_adapter(first).blocks[-1].gate), "they are fitted again"


def test_a_run_goes_on_and_is_exported_without_the_file_it_started_from(tmp_path, base, corpus, first):
    start = Path(shutil.copy(first, tmp_path / "start.safetensors"))
    recipe = write_recipe(tmp_path, base, tokens=512, blocks__start=str(start), run__schedule="constant")
    longer = write_recipe(tmp_path, base, tokens=1024, blocks__start=str(start), run__schedule="constant")
    whole = read_adapter(train(longer, tmp_path / "whole", corpus))
    made = read_adapter(train(recipe, tmp_path / "out", corpus))
    start.unlink()
    exported = read_adapter(export_run(tmp_path / "out", tmp_path / "x.safetensors"))
    for ours, theirs in zip(exported.blocks, made.blocks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(vars(ours).values(), vars(theirs).values(), strict=True))
    assert read_adapter(train(longer, tmp_path / "out", corpus, resume=True)).version == whole.version


def test_a_run_does_not_go_on_beside_another_version_of_the_file_it_started_from(tmp_path, base, corpus, first):
    start = Path(shutil.copy(first, tmp_path / "start.safetensors"))
    recipe = write_recipe(tmp_path, base, tokens=256, blocks__start=str(start))
    out = tmp_path / "out"
    train(recipe, out, corpus)
    assert finished(out, recipe) is not None
    adapter = read_adapter(first)
    write_adapter(start, replace(adapter.info, threshold=0.123), adapter.blocks)
    assert finished(out, recipe) is None
    with pytest.raises(Conflict, match=r"from another .*start\.safetensors; it goes on if that is moved away"):
        train(recipe, out, corpus, resume=True)
    start.unlink()
    assert finished(out, recipe) is not None
    train(recipe, out, corpus, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks__h": 32}, "the width of blocks, by layer is"),
        ({"blocks__carry": 0.5}, r"the carry is 0.8 in .* and 0.5 in the recipe"),
        ({"gate__kind": "relu"}, "the kind of gate is relu1"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path, base, corpus, first, changes, message):
    recipe = write_recipe(tmp_path, base, blocks__start=str(first), **changes)
    with pytest.raises(BadRecipe, match=message):
        train(recipe, tmp_path / "out", corpus)


def test_a_file_of_another_base_or_none_is_refused(tmp_path, base, corpus, first):
    adapter = read_adapter(first)
    other = tmp_path / "other.safetensors"
    write_adapter(other, replace(adapter.info, base_fingerprint="0" * 16), adapter.blocks)
    for start, message in ((other, "made for another base"), (tmp_path / "none.safetensors", "cannot be read")):
        recipe = write_recipe(tmp_path, base, blocks__start=str(start))
        with pytest.raises(BadAdapterFile, match=message):
            train(recipe, tmp_path / "out", corpus)
