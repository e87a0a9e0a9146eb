"""The adapters beside their recipes: each file is what its recipe makes, and its card is of that file."""

from pathlib import Path

import pytest

from nr_serve.neutral.format import read_adapter
from nr_serve.train.recipe_file import parse_recipe, read_recipe

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[2] / "adapters").glob("*/*.safetensors"))


def test_four_are_shipped():
    assert [folder.name for folder in FOLDERS] == ["bio", "da", "hu", "sk"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_file_is_of_its_recipe_and_a_card_of_its_file(folder):
    file = folder / f"{folder.name}.safetensors"
    info = read_adapter(file).info
    recipe = read_recipe(folder / "recipe.toml")
    made_by = parse_recipe(dict(info.recipe))
    assert made_by.continues(recipe.with_gate(threshold=info.threshold), info.results["tokens"])
    assert recipe.threshold == info.threshold
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| version | `{read_adapter(file).version}` |" in card
    assert file.stat().st_size <= 14_000_000
