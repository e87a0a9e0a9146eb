"""The adapters beside their recipes: each file is what its recipe makes, and its card is of that file."""

import json
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import pytest

from nr_serve.neutral.format import read_adapter
from nr_serve.train.recipe import Recipe
from nr_serve.train.recipe_file import parse_recipe, read_recipe
from nr_serve.train.sweep import read_sweep

AT = Path(__file__).parents[2] / "adapters"
FOLDERS = sorted(path.parent for path in AT.glob("*/*.safetensors"))
SWEEPS = sorted(path for path in AT.rglob("*.toml") if "\n[runs." in path.read_text(encoding="utf-8"))


def test_four_are_shipped():
    assert [folder.name for folder in FOLDERS] == ["bio", "da", "hu", "sk"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_sweep_can_be_trained(path):
    assert len(read_sweep(path)) >= 4


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_file_is_of_its_recipe_and_a_card_of_its_file(folder):
    file = folder / f"{folder.name}.safetensors"
    info = read_adapter(file).info
    recipe = read_recipe(folder / "recipe.toml")
    beside = info.results.get("calibrated", {}).get("beside", {})
    made_by = without(parse_recipe(dict(info.recipe)), beside)
    turned = recipe.with_gate(**dials(folder / "recipe.toml"))
    turned = turned.model_copy(
        update={"blocks": turned.blocks.model_copy(update=carry_given(folder / "recipe.toml"))}
    )
    changed = made_by.with_gate(threshold=made_by.threshold).changed(
        turned.with_gate(threshold=turned.threshold), info.results["tokens"]
    )
    assert changed == {}
    assert info.threshold == made_by.threshold
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| version | `{read_adapter(file).version}` |" in card
    assert file.stat().st_size <= 14_000_000
    assert beside == {name: read_adapter(AT / name / f"{name}.safetensors").version for name in beside}


def dials(recipe: Path) -> dict[str, float]:
    """What the commands at the top of a recipe change of its [gate] after training."""
    text = recipe.read_text(encoding="utf-8")
    commands = "".join(re.findall(r"^#.*", text, re.M))
    set_to = re.findall(r" --set (\w+)=([\d.]+)", commands)
    return {
        key: json.loads(value) for key, value in [*set_to, *re.findall(r"^#.* --(threshold) ([\d.]+)", text, re.M)]
    }


def carry_given(recipe: Path) -> dict[str, float]:
    """The carry that the commands at the top of a recipe give to its gates after training, if they do."""
    given = re.findall(r"^#.* --carry ([\d.]+)", recipe.read_text(encoding="utf-8"), re.M)
    return {"carry": float(given[-1])} if given else {}


def without(recipe: Recipe, beside: Iterable[str]) -> Recipe:
    """The recipe without the text of adapters that its gates were fitted beside."""
    others = [read_recipe(AT / name / "recipe.toml") for name in beside]
    own = [file for file in recipe.data.background if "*" in file or not any(owns(other, file) for other in others)]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"background": tuple(own)})})


def owns(recipe: Recipe, file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in recipe.data.target)
