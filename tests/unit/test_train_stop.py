"""A run that SIGTERM or Ctrl-C ends says where it can go on, and goes on there."""

import signal
import subprocess
import sys

import pytest

from nr_serve.train.run import train
from nr_serve.train.sweep import read_sweep, run_sweep
from tests.tiny_run import write_recipe, write_sweep

WAITS = """
import signal, sys
from nr_serve.cli import main
from nr_serve.train.trainer import RunTrainer

loss, last = RunTrainer.compute_loss, int(sys.argv[1])

def waits(self, *args, **more):
    if self.state.global_step == last:
        print("waiting", flush=True)
        while True:
            signal.pause()
    return loss(self, *args, **more)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
RunTrainer.compute_loss = waits
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("number", "code", "steps", "said"),
    [
        (signal.SIGTERM, 143, 5, "train: stopped; --resume goes on from {out}/checkpoint-4"),
        (signal.SIGINT, 130, 0, "train: stopped; there is no checkpoint yet to go on from"),
    ],
)
def test_a_stopped_run_says_where_it_can_go_on(tmp_path, base, corpus, number, code, steps, said):
    recipe, out = write_recipe(tmp_path, base), tmp_path / "out"
    flags = ["train", tmp_path / "recipe.toml", "--corpus", corpus, "--out", out]
    command = [sys.executable, "-c", WAITS, str(steps), *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "waiting\n"
        run.send_signal(number)
        _, told = run.communicate()
    assert run.returncode == code
    assert told.splitlines()[-1] == said.format(out=out)
    assert "Traceback" not in told
    assert train(recipe, out, corpus, resume=True).exists()


def test_a_stopped_sweep_says_so_and_goes_on(tmp_path, base, corpus):
    path, out = write_sweep(tmp_path, base, '[runs.a]\n"data.original" = ["en.a.train.txt"]\n'), tmp_path / "out"
    command = [sys.executable, "-c", WAITS, "3", "sweep", str(path), "--corpus", str(corpus), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sweep:
        assert sweep.stdout.readline() == "waiting\n"
        sweep.send_signal(signal.SIGTERM)
        _, told = sweep.communicate()
    assert sweep.returncode == 143
    assert told.splitlines()[-1] == "sweep: stopped; the same command goes on where this one was"
    assert run_sweep(read_sweep(path), out, corpus)["a"].exists()
