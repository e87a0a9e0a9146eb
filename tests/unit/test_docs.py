"""The documentation says what the code says."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from nr_serve.api.schemas import CompletionBody
from nr_serve.cli import VLLM_FLAGS, main, parse
from nr_serve.commands import COMMANDS
from nr_serve.config import _OTHERS, ServeConfig, settings_tables
from nr_serve.default_model import GGUF_NAME
from nr_serve.keys import read_key_file
from nr_serve.train.corpus import recipe as corpus_recipe
from nr_serve.train.recipe import Recipe
from nr_serve.train.recipe_file import parse_changes, read_recipe
from nr_serve.train.recipe_table import recipe_tables
from tests.guide import COMMAND_LINES, GUIDE, blocks
from tests.structure import modules_tables

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SETTINGS = (DOCS / "settings.md").read_text(encoding="utf-8")


def test_the_settings_page_holds_the_settings():
    assert settings_tables() in SETTINGS, (
        "docs/settings.md is out of date: paste what nr_serve.config.settings_tables() returns"
    )


def test_the_settings_page_holds_every_variable_that_is_no_setting():
    named = re.findall(r"^\| `(NR_\w+)` \|", SETTINGS, re.M)
    assert sorted(named) == sorted(_OTHERS)


def test_the_settings_file_of_the_page_is_read(tmp_path, monkeypatch):
    monkeypatch.delenv("NR_DTYPE")
    (example,) = re.findall(r"```toml\n(model = .+?)```", SETTINGS, re.S)
    path = tmp_path / "nr.toml"
    path.write_text(example, encoding="utf-8")
    config = parse(ServeConfig, "serve", ["--config", str(path)])
    assert config.model_fields_set == {"config", *tomllib.loads(example)}


def test_the_key_file_of_the_page_is_read(tmp_path):
    (example,) = re.findall(r"```toml\n(\[\[key\]\].+?)```", SETTINGS, re.S)
    path = tmp_path / "keys.toml"
    path.write_text(example, encoding="utf-8")
    assert [key.role for key in read_key_file(path)] == ["inference", "admin"]


def test_a_list_in_the_environment_has_commas_as_the_page_says(monkeypatch):
    (example,) = re.findall(r"`NR_ADAPTER=(.+)`", SETTINGS)
    monkeypatch.setenv("NR_ADAPTER", example)
    assert ServeConfig().adapter == ["hu.safetensors", "da=x.safetensors"]
    monkeypatch.setenv("NR_ADAPTER", "hu.safetensors")
    monkeypatch.setenv("NR_ADAPTER_DIR", "/a, b/c,")
    assert (ServeConfig().adapter, ServeConfig().adapter_dir) == (["hu.safetensors"], [Path("/a"), Path("b/c")])
    monkeypatch.setenv("NR_ADAPTER", "")
    assert ServeConfig().adapter == []


def test_the_security_page_says_what_each_package_is_for():
    page = (DOCS / "security.md").read_text(encoding="utf-8")
    table = page.split("| package | for |")[1]
    rows = dict(re.findall(r"^\| (\w[\w-]*) \| (.+) \|$", table, re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert list(rows) == [re.match(r"[\w-]+", each)[0] for each in project["dependencies"]]


def test_the_commands_of_the_security_page_are_understood(tmp_path):
    page = (DOCS / "security.md").read_text(encoding="utf-8")
    make_key, serve = re.findall(r"^    nr-serve (.+)$", page, re.M)
    name, _, file = make_key.removeprefix("make-key ").split()
    assert parse(COMMANDS["make-key"][0], "make-key", [name]).name == name
    config = parse(ServeConfig, "serve", shlex.split(serve)[1:])
    assert (config.host, config.key_file) == ("0.0.0.0", Path(file))


PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((ROOT / "adapters").glob("*/README.md"))]


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as hosts of git repositories make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link


def _commands_shown() -> list[tuple[str, str]]:
    """Each page and each command line in it, without what a shell does with its input and output."""
    found = []
    for page in PAGES:
        whole = re.sub(r" \\\n\s*", " ", page.read_text(encoding="utf-8"))
        lines = re.findall(r"^ {4,}(?:[A-Z_]+=\S+ )*nr-serve ([a-z].*)$", whole, re.M)
        found += [(page.name, re.split(r" [|<>&]", line)[0]) for line in lines]
    return found


@pytest.mark.parametrize(("page", "line"), _commands_shown())
def test_every_command_line_shown_is_understood(page, line):
    name, *args = shlex.split(line, comments=True)
    assert isinstance(parse(COMMANDS[name][0], name, args), BaseSettings), page


def test_the_structure_page_holds_every_module():
    page = (DOCS / "structure.md").read_text(encoding="utf-8")
    assert modules_tables() in page, (
        "docs/structure.md is out of date: paste what `python -m tests.structure` prints"
    )
    files = re.findall(r"`([\w/]+\.py)`", page.split("## The files")[0])
    assert files
    assert all((ROOT / "nr_serve" / name.removeprefix("nr_serve/")).is_file() for name in files)


def test_the_recipe_page_holds_the_keys():
    assert recipe_tables() in (DOCS / "recipe.md").read_text(encoding="utf-8"), (
        "docs/recipe.md is out of date: paste what nr_serve.train.recipe_table.recipe_tables() returns"
    )


def test_the_recipe_page_names_every_key_with_its_default():
    sections = dict(re.findall(r"## (.+?)\n(.+?)(?=\n## |\Z)", recipe_tables(), re.S))
    for name, field in Recipe.model_fields.items():
        if f"`[{name}]`" not in sections:
            assert f"| `{name}` |" in sections["At the top"]
            continue
        for key, each in field.annotation.model_fields.items():
            (row,) = re.findall(rf"^\| `{key}` \| (.*) \|$", sections[f"`[{name}]`"], re.M)
            kind, default, meaning = row.split(" | ")
            assert (bool(kind), meaning) == (True, each.description)
            if each.is_required():
                assert default == "must be given"
            elif each.default in (None, ()):
                assert default == "none"
            elif isinstance(each.default, str):
                assert default == f"`{each.default}`"
            else:
                assert tomllib.loads(f"x = {default.strip('`')}")["x"] == each.default


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_line_of_the_guide_is_understood(line, tmp_path):
    _, name, *args = shlex.split(line)
    command = parse(COMMANDS[name][0], name, args)
    assert isinstance(command, BaseSettings)
    if name in ("train", "calibrate"):
        changes = parse_changes(command.set)
        changes = changes if name == "train" else {f"gate.{key}": value for key, value in changes.items()}
        recipe = tmp_path / "tr.toml"
        recipe.write_text(blocks()["tr.toml"], encoding="utf-8")
        assert read_recipe(recipe, changes).dump() != read_recipe(recipe).dump() or not changes


def test_the_guide_shows_every_command_of_the_way():
    used = [line.split()[1] for line in COMMAND_LINES]
    way = ["fetch-corpus", "train", "evaluate", "calibrate", "serve", "load-adapter"]
    assert sorted(way, key=used.index) == way


def test_the_recipes_of_the_guide_are_read(tmp_path):
    for name, text in blocks().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    [source] = corpus_recipe.read_recipe(tmp_path / "my-corpus.toml")
    assert (source.name, source.kind, source.folder) == ("tr.mytext", "folder", "my-text")
    recipe = read_recipe(tmp_path / "tr.toml")
    assert recipe.owns(source.name)


def test_the_text_of_the_guides_recipe_is_what_the_guide_fetches():
    fetched = next(line for line in COMMAND_LINES if "adapters/corpora.toml" in line)
    only = parse(COMMANDS["fetch-corpus"][0], "fetch-corpus", shlex.split(fetched)[2:]).only
    named = [source.name for source in corpus_recipe.read_recipe(ROOT / "adapters" / "corpora.toml")]
    there = {name for name in named if any(Path(name).match(pattern) for pattern in only)} | {"tr.mytext"}
    data = tomllib.loads(blocks()["tr.toml"])["data"]
    for glob in [glob for globs in data.values() for glob in globs]:
        assert any(Path(f"{name}.{part}.txt").match(glob) for name in there for part in ("train", "heldout")), glob


def test_the_first_request_of_the_guide_is_one_the_server_takes():
    (line,) = re.findall(r"^    (curl .+)$", GUIDE, re.M)
    words = shlex.split(line)
    assert "http://127.0.0.1:8000/v1/completions" in words
    body = CompletionBody.model_validate(json.loads(words[words.index("-d") + 1]))
    assert (body.model, body.gates) == ("smollm2-135m-instruct", True)


def test_what_the_readme_says_of_base_and_adapters_is_so():
    start = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Try it")[0]
    assert re.search(r"4-bit\s+GGUF", start)
    assert ".Q4_" in GGUF_NAME
    assert re.search(r"half\s+a\s+million\s+tokens", start)
    recipes = [read_recipe(path) for path in ROOT.glob("adapters/*/recipe.toml")]
    assert {recipe.run.tokens for recipe in recipes} == {512_000}


def test_the_flags_that_the_readme_gives_for_vllms_are_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| vLLM \| nr-serve \|\n((?:\|.*\n)+)", readme)
    named = re.findall(r"--(?:no-)?([a-z-]+)", "".join(line.split("|")[2] for line in table.splitlines()[1:]))
    assert len(named) >= 5
    assert {name.replace("-", "_") for name in named} <= ServeConfig.model_fields.keys()


def test_vllms_flags_are_told_as_the_readme_has_them(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for theirs, ours in VLLM_FLAGS.items():
        [row] = [line for line in readme.splitlines() if line.startswith("| `") and f"`{theirs}" in line]
        assert ours.removeprefix("--") in row.split("|")[2]
        with pytest.raises(SystemExit):
            main(["serve", theirs, "1"])
        assert f"vLLM's `{theirs}` is `{ours}` here" in capsys.readouterr().err
