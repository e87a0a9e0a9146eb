"""A run that is killed with SIGKILL, at whatever moment, goes on to the very adapter of an uninterrupted one."""

import multiprocessing
import signal
from collections.abc import Callable
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


def in_process(target: Callable[..., object], *args: object, **more: object) -> int | None:
    """The exit code of a process of its own: as runs on the command line have, all begin alike in it."""
    child = PROCESSES.Process(target=target, args=args, kwargs=more)
    child.start()
    child.join()
    return child.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, corpus) -> Path:
    """The folder of an uninterrupted run, with its recipe."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_process(train, write_recipe(folder, base), folder / "out", corpus) == 0
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(whole, tmp_path, corpus, moment):
    recipe, out = whole / "recipe.toml", tmp_path / "out"
    assert in_process(train_until, moment, recipe, out, corpus) == -signal.SIGKILL
    assert not (out / "hu.safetensors").exists()
    assert in_process(train, read_recipe(recipe), out, corpus, resume=True) == 0
    expected, got = weights(whole / "out"), weights(out)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert read_adapter(out / "hu.safetensors").info == read_adapter(whole / "out" / "hu.safetensors").info
    assert not list(out.glob(".*.part/"))
