"""The guide docs/add-a-language.md is followed, step by step, on made-up text and a tiny base."""

import json
import random
import shlex
import tomllib

import pytest

from nr_serve.cli import main
from nr_serve.neutral.format import read_adapter, write_adapter
from tests import tiny
from tests.guide import COMMAND_LINES, blocks

TINY = (
    "run.window=16 run.batch_tokens=128 run.tokens=2560 run.lr=0.03 run.warmup_tokens=256 "
    "run.validate_windows=4 gate.fit_tokens=256 blocks.h=16"
)
"""What is changed in the guide's recipe."""


def made_up(language: str, documents: int) -> str:
    """Text of a made-up language: its words have seven letters of its own."""
    chance = random.Random(language)
    letters = list("ğşçöüâî") if language == "tr" else chance.sample("abcdefghijklmnopqrstuvwxyz", 7)

    def paragraph():
        return " ".join("".join(chance.choices(letters, k=chance.randint(3, 7))) for _ in range(12))

    return "\n\n".join("\n".join(paragraph() for _ in range(3)) for _ in range(documents))


@pytest.fixture
def place(tmp_path, monkeypatch, base):
    """The reader's folder: text, the two files of the guide, and another adapter; `base` is the default base."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "my-text" / f"{name}.txt").write_text(made_up("tr", 20), encoding="utf-8")
    for name, text in blocks().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def others(place):
    """A corpus recipe with a folder for each source of the guide's training recipe, in place of packages."""
    data = tomllib.loads(blocks()["tr.toml"])["data"]
    globs = [glob for globs in data.values() for glob in globs]
    names = {".".join(glob.split(".")[:2]).replace("*", "ddtp") for glob in globs} - {"tr.ddtp"}
    tables = []
    for language, name in (each.split(".") for each in sorted(names)):
        (place / "others" / language / name).mkdir(parents=True)
        text = made_up(f"{language}.{name}" if language == "en" else language + name, 20)
        (place / "others" / language / name / "text.txt").write_text(text, encoding="utf-8")
        table = {"name": name, "languages": [language], "kind": "folder", "folder": f"others/{language}/{name}"}
        tables.append(table | {"files": ["*.txt"], "format": "plain"})
    written = [[f"{key} = {json.dumps(value)}" for key, value in table.items()] for table in tables]
    (place / "others.toml").write_text("\n".join("\n".join(["[[source]]", *lines]) for lines in written))


def neighbour(place, base):
    """A Hungarian adapter where the guide has one."""
    made = tiny.adapter(tiny.model(), 1, carry=0.5)
    data = {"target": ["hu.*.train.txt"], "original": ["en.*.train.txt"], "background": []}
    info = made.info.__class__(
        **{
            **vars(made.info),
            "base": base.name,
            "domain": "hu",
            "recipe": {"domain": "hu", "data": data, "blocks": {"h": 16}, "run": {"tokens": 1024}},
        }
    )
    (place / "adapters" / "hu").mkdir(parents=True)
    write_adapter(place / "adapters" / "hu" / "hu.safetensors", info, made.blocks)


def step(start: str, *more: str) -> None:
    """Run the guide's first command line that starts so, with flags added."""
    line = next(line for line in COMMAND_LINES if line.startswith(f"nr-serve {start}"))
    assert main([*shlex.split(line)[1:], *more]) == 0, line


def test_the_way_from_a_folder_of_text_to_a_calibrated_adapter(place, base, capsys):
    others(place)
    neighbour(place, base)
    assert main(["fetch-corpus", "others.toml", "--out", "corpus"]) == 0  # the guide's own needs apt
    step("fetch-corpus my-corpus.toml")
    rows = capsys.readouterr().out.splitlines()
    assert rows[-1].split()[0] == "tr.mytext"
    assert "en.anarchism" in json.loads((place / "corpus" / "manifest.json").read_text())

    changes = [flag for change in [f"base={base}", *TINY.split()] for flag in ("--set", change)]
    step("train tr.toml", *changes)
    trained = read_adapter(place / "runs" / "tr" / "tr.safetensors")
    learned = trained.info.results["heldout"]
    assert learned["tr.mytext"]["after"] < learned["tr.mytext"]["before"] - 0.1
    assert learned["en.boolq"]["fired"] < 0.2 < learned["tr.mytext"]["fired"]

    same_base, short = ["--model", str(base)], ["--window", "16"]
    capsys.readouterr()
    step("evaluate runs/tr/tr.safetensors --", *same_base, *short)
    assert "tr.mytext" in capsys.readouterr().out
    assert "| tr.mytext |" in (place / "tr.md").read_text()
    step("evaluate runs/tr/tr.safetensors adapters/hu", *same_base, *short)
    roles = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["tr.mytext", "own", "tr"] in roles
    assert ["hu.ddtp", "own", "hu"] in roles

    step("calibrate runs/tr/tr.safetensors --beside", *same_base)
    calibrated = read_adapter(place / "tr.safetensors")
    assert list(calibrated.info.results["calibrated"]["beside"]) == ["hu"]
    assert calibrated.version != trained.version
    step("calibrate runs/tr/tr.safetensors --corpus", *same_base)
    assert list(read_adapter(place / "tr.safetensors").info.results["calibrated"]["beside"]) == []
    assert read_adapter(place / "tr.safetensors").info.recipe["gate"]["percentile"] == 99.9
