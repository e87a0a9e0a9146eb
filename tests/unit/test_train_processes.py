"""Several processes take one run together: they learn what one learns, and only the first one tells and writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nr_serve.neutral.format import read_adapter
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train.recipe_file import read_recipe
from nr_serve.train.run import train
from tests.tiny_run import RECIPE

COMMAND = "import sys; from nr_serve.cli import main; sys.exit(main(sys.argv[1:]))"


def free_port() -> int:
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        return int(at.getsockname()[1])


def launch(count: int, *arguments: object, timeout: float = 300) -> list[tuple[int, str, str]]:
    """Run the command line in so many processes that know of each other; code, stdout and stderr of each."""
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    shared |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND, *map(str, arguments)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *streams) for process, streams in zip(started, said, strict=True)]


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def recipe(tmp_path, base) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(base=base, tokens=512, lr=0.01, gate=""))
    return path


def test_two_processes_make_the_adapter_that_one_makes(tmp_path, recipe, corpus):
    outs = [tmp_path / "one", tmp_path / "two"]
    train(read_recipe(recipe), outs[0], corpus)
    ended = launch(2, "train", recipe, "--corpus", corpus, "--out", outs[1])
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    assert [out for _, out, _ in ended] == [f"{outs[1] / 'hu.safetensors'}\n", ""]
    said = ended[0][2] + ended[1][2]
    assert said.count("reading and packing") == said.count("fitting the gates again") == 1
    assert said.count("gates find") == 2
    one, two = (log_of(out) for out in outs)
    assert [entry["event"] for entry in one] == [entry["event"] for entry in two]
    for a, b in zip(one, two, strict=True):
        for name in {"loss", "lm", "local", "grad_norm", "target_fired", "other_fired"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3), (a["step"], name)
    first, second = (read_adapter(out / "hu.safetensors") for out in outs)
    assert second.info.results["tokens"] == first.info.results["tokens"] == 512
    weights = [checkpoints.load(checkpoints.latest(out)).weights() for out in outs]
    for name, tensor in weights[0].items():
        # Adam's first steps are nearly signs, so weights whose gradient is nearly 0 may differ by the rate.
        assert torch.isclose(tensor, weights[1][name], atol=1e-3).float().mean() > 0.98, name


def test_a_refusal_by_the_first_process_is_one_by_all(tmp_path, recipe, corpus):
    out = tmp_path / "out"
    out.mkdir()
    with checkpoints.alone(out):
        ended = launch(2, "train", recipe, "--corpus", corpus, "--out", out)
    assert [code for code, _, _ in ended] == [1, 1]
    assert all("another process trains in" in err for _, _, err in ended)


def test_two_processes_stop_and_sweep_together(tmp_path, recipe, corpus):
    """Early stopping is decided for all; a run that diverges does not stop the next one; the comparison is one."""
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        'recipe = "recipe.toml"\n[set]\n"data.original" = ["en.a.train.txt"]\n'
        '[runs.bad]\n"method" = "finetune"\n"run.lr" = 1e30\n'
        '[runs.stops]\n"run.tokens" = 12800\n"run.lr" = 1.0\n"run.patience" = 1\n"run.validate_every" = 128\n'
    )
    ended = launch(2, "sweep", sweep, "--corpus", corpus, "--out", tmp_path / "out", "--windows", "2")
    assert [code for code, _, _ in ended] == [1, 1], ended[0][2] + ended[1][2]
    assert "".join(err for _, _, err in ended).count("sweep: bad failed") == 1
    newest = checkpoints.load(checkpoints.latest(tmp_path / "out" / "stops"))
    assert newest.stopped
    assert newest.step < 100
    assert (tmp_path / "out" / "stops" / "hu.safetensors").exists()
    assert ended[0][1].splitlines()[0] == str(tmp_path / "out" / "comparison.json")
    assert ended[1][1] == ""
