"""What a run is refused for is said before its base is loaded; of a sweep, before its first run starts."""

import random
import shutil
from pathlib import Path

import pytest

from nr_serve.errors import BadRequest
from nr_serve.train import run
from nr_serve.train.recipe import BadRecipe
from nr_serve.train.run import train
from nr_serve.train.run_text import read_run_text
from nr_serve.train.sweep import read_sweep, run_sweep
from tests.tiny_run import write_recipe, write_sweep

PROSE = "\n\n".join(" ".join(f"w{i}" for i in range(start, start + 50)) for start in range(0, 2500, 50)).encode()

FAULTS = {
    "no text": ({"data__target": ["xx.*"]}, {}, r"no text in .* matches 'xx\.\*'"),
    "an empty file": ({}, {"hu.a.train.txt": b"\n \n\n"}, r"hu\.a\.train\.txt holds no text"),
    "another encoding": ({}, {"da.a.train.txt": b"\xe6\xf8"}, r"da\.a\.train\.txt is not UTF-8: line 1, byte 0"),
    "too little text": ({}, {"hu.a.train.txt": b"a"}, "the text of target fills 0 windows"),
    "a target that is the original": (
        {},
        {"hu.a.train.txt": PROSE, "en.a.train.txt": PROSE},
        r"the target and the text of original en\.a share 100%",
    ),
    "held-out text that is learned": (
        {},
        {"hu.a.train.txt": PROSE, "hu.a.heldout.txt": PROSE},
        r"held-out text of hu\.a and the target share 100%",
    ),
    "held-out documents of one token": (
        {},
        {"hu.a.heldout.txt": b"\n\n".join([b"x", b"y"] * 40)},
        "text of hu.a is of documents of one token each",
    ),
    "no background for its share": ({"data__background": []}, {}, "data.background names no text"),
    "a window that the base cannot read": (
        {"run__window": 1024, "run__batch_tokens": 10_240, "tokens": 10_240},
        {},
        r"run\.window is 1,024 tokens; the base reads at most 512",
    ),
    "parts that do not divide": ({"run__accumulate": 3}, {}, "do not divide into 3 parts"),
    "patience without its text": (
        {"run__patience": 1, "data__heldout": ["en.*.heldout.txt"]},
        {},
        r"run\.patience watches",
    ),
}


def fails(*_, **__):
    raise AssertionError("this was not to be called")


def spoiled(corpus: Path, folder: Path, files: dict[str, bytes]) -> Path:
    shutil.copytree(corpus, folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_text_and_a_recipe_that_does_not_suit_it_are_refused_before_the_base_is_loaded(
    tmp_path, base, corpus, monkeypatch, fault
):
    changes, files, message = FAULTS[fault]
    monkeypatch.setattr(run, "load_base", fails)
    with pytest.raises(BadRecipe, match=message):
        train(write_recipe(tmp_path, base, **changes), tmp_path / "out", spoiled(corpus, tmp_path / "text", files))


def test_text_that_is_missing_is_said_before_the_base_is_looked_for(tmp_path, corpus):
    recipe = write_recipe(tmp_path, tmp_path / "no base", data__target=["xx.*"])
    with pytest.raises(BadRecipe, match="matches 'xx"):
        train(recipe, tmp_path / "out", corpus)


def test_background_text_of_the_targets_own_language_is_told(tmp_path, base, corpus, capsys):
    text = spoiled(corpus, tmp_path / "text", {"hu.b.train.txt": (corpus / "hu.a.heldout.txt").read_bytes()})
    for background, told in (["da.*.train.txt"], 0), (["da.*.train.txt", "hu.b.train.txt"], 1):
        changes = {"data__target": ["hu.a.train.txt"], "data__background": background, "data__heldout": []}
        read_run_text(write_recipe(tmp_path, base, **changes), text)
        warning = "train: warning: data.background holds text of hu, the target's own language"
        assert capsys.readouterr().err.count(warning) == told


def test_a_run_whose_gates_find_too_little_in_every_layer_is_refused(tmp_path, base, corpus):
    rng = random.Random(9)
    alike = "\n\n".join(
        "".join(rng.choices("the ", k=40)) for _ in range(60)
    ).encode()  # nothing tells it from English
    text = spoiled(corpus, tmp_path / "text", {"hu.a.train.txt": alike})
    recipe = write_recipe(tmp_path, base, gate__min_found=0.9999)
    with pytest.raises(BadRecipe, match=r"no layer's gate finds gate\.min_found, 0\.9999, of the target"):
        train(recipe, tmp_path / "out", text)


def test_a_sweep_checks_the_text_of_every_run_before_the_first_starts(tmp_path, base, corpus, monkeypatch):
    path = write_sweep(tmp_path, base, '[runs.a]\n[runs.b]\n"data.background" = ["da.*.train.txt", "sv.*"]\n')
    text = spoiled(corpus, tmp_path / "text", {"sv.a.train.txt": b"\xe6"})
    monkeypatch.setattr(run, "train", fails)
    with pytest.raises(BadRecipe, match=r"^run b: .*sv\.a\.train\.txt is not UTF-8"):
        run_sweep(read_sweep(path), tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_the_text_of_finished_runs_must_still_be_there_to_be_compared(tmp_path, base, corpus):
    path = write_sweep(tmp_path, base, "[runs.a]\n")
    made = run_sweep(read_sweep(path), tmp_path / "out", corpus)
    assert run_sweep(read_sweep(path), tmp_path / "out", corpus) == made
    with pytest.raises(BadRequest, match="run a: there is no folder"):
        run_sweep(read_sweep(path), tmp_path / "out", tmp_path / "gone")
