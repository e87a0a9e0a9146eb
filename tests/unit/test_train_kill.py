"""A run that is killed with SIGKILL, at whatever moment, goes on to the very adapter of an uninterrupted one."""

import multiprocessing
import signal
from pathlib import Path

import pytest
import torch

from nr_serve.neutral.format import read_adapter
from nr_serve.train.recipe_file import read_recipe
from nr_serve.train.run import train
from tests.tiny_run import weights, write_recipe
from tests.unit.killing import MOMENTS, train_until

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.unit.killing"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, corpus) -> Path:
    """The folder of an uninterrupted run, with its recipe."""
    folder = tmp_path_factory.mktemp("whole")
    train(write_recipe(folder, base), folder / "out", corpus)
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(whole, tmp_path, corpus, moment):
    recipe, out = whole / "recipe.toml", tmp_path / "out"
    child = PROCESSES.Process(target=train_until, args=(moment, recipe, out, corpus))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (out / "hu.safetensors").exists()
    made = train(read_recipe(recipe), out, corpus, resume=True)
    expected, got = weights(whole / "out"), weights(out)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert read_adapter(made).info == read_adapter(whole / "out" / "hu.safetensors").info
    assert not list(out.glob(".*.part/"))
