"""The command: its tables, its files, and what it refuses before it measures anything."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nr_serve.cli import main, parse
from nr_serve.commands import COMMANDS
from nr_serve.neutral.format import write_adapter
from tests import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a base, text of four languages, two adapters and a task."""
    folder = tmp_path_factory.mktemp("place")
    tiny.save(tiny.model(), folder / "base")
    (folder / "corpus").mkdir()
    for i, language in enumerate(("hu", "en", "nb", "ca")):
        g = torch.Generator().manual_seed(i)
        picks = torch.randint(0, 26, (20, 40), generator=g).tolist()
        text = "\n\n".join("".join(chr(97 + letter) for letter in row) for row in picks)
        (folder / "corpus" / f"{language}.a.heldout.txt").write_text(text, encoding="utf-8")
    for seed, (name, target) in enumerate({"hu": "hu.*.train.txt", "da": "da.*.train.txt"}.items()):
        made = tiny.adapter(tiny.model(), seed, carry=0.5)
        data = {"target": [target], "original": ["en.*.train.txt"], "background": []}
        recipe = {"data": data, "gate": {"init": "closed-form", "trained": False}}
        info = made.info.__class__(**{**vars(made.info), "domain": name, "recipe": recipe})
        write_adapter(folder / f"{name}.safetensors", info, made.blocks)
    documents = (folder / "corpus" / "hu.a.heldout.txt").read_text().split("\n\n")
    lines = "\n".join(json.dumps({"body": document}) for document in documents)
    (folder / "corpus" / "hu.b.heldout.jsonl").write_text(lines)
    rows = [{"context": "abc", "choices": ["x", "y"], "gold": i % 2} for i in range(4)]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    """Tokens are not kept in the user's own cache."""
    monkeypatch.setenv("NR_CACHE", str(tmp_path_factory.mktemp("cache")))


def run(place: Path, *flags: str | Path, files: tuple[str, ...] = ("hu", "da"), corpus: bool = True) -> int:
    paths = [str(place / f"{name}.safetensors") for name in files]
    text = ["--corpus", str(place / "corpus"), "--window", "16", "--windows", "2"] if corpus else []
    return main(["evaluate", *paths, "--model", str(place / "base"), *text, *map(str, flags)])


def test_interference_prints_a_row_a_source_and_the_worst(place, capsys):
    assert run(place, "--interference", "--near", "nb=da") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["hu.a", "own"],
        ["nb.a", "near"],
        ["en.a", "original"],
        ["ca.a", "unseen"],
    ]
    assert lines[0].endswith("FIRED hu  FIRED da")
    assert any(line.startswith("fired on close relatives") and line.endswith("da on nb.a") for line in lines)


def test_text_that_an_adapter_was_trained_on_is_told(place, tmp_path, capsys):
    shutil.copytree(place / "corpus", tmp_path / "corpus")
    for name in ("hu.a.train.txt", "fi.a.train.txt"):
        shutil.copy(place / "corpus" / "hu.a.heldout.txt", tmp_path / "corpus" / name)
    flags = ["--corpus", tmp_path / "corpus", "--window", "16", "--windows", "1"]
    assert run(place, *flags, "--source", "*.txt", corpus=False) == 0
    assert "evaluate: warning: not held out, but trained on: hu.a.train.txt\n" in capsys.readouterr().err
    assert run(place, *flags, corpus=False) == 0
    assert "warning" not in capsys.readouterr().err


def test_the_pages_link_the_plots_that_were_written(place, tmp_path, capsys):
    flags = ["--interference", "--plots", tmp_path / "plots", "--card", tmp_path / "README.md"]
    assert run(place, *flags, "--markdown", tmp_path / "together.md", "--tasks", place / "task.jsonl") == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"gates-hu.svg", "gates-da.svg", "interference.svg"}
    card, together = (tmp_path / "README.md").read_text(), (tmp_path / "together.md").read_text()
    assert "(plots/gates-hu.svg)" in card
    assert "gates-da.svg" not in card
    assert "| task | 4 | acc |" in card
    assert all(f"(plots/{name})" in together for name in names)
    capsys.readouterr()


def test_json_is_one_document_with_the_tasks_in_it(place, tmp_path, capsys):
    assert run(place, "--json", "--tasks", place / "task.jsonl", "--limit", "2") == 0
    read = json.loads(capsys.readouterr().out)
    assert set(read["sources"]) == {"hu.a", "en.a", "nb.a", "ca.a"}
    assert read["tasks"]["task"]["examples"] == 2
    assert run(place, "--json", "--tasks", place / "task.jsonl", corpus=False) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"adapters", "tasks"}
    assert run(place, "--plots", tmp_path, "--plot-format", "png") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"gates-hu.png", "gates-da.png"}
    assert "CHANGE" in capsys.readouterr().out


def test_a_base_in_bfloat16_gives_nearly_the_same_losses(place, capsys):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        assert run(place, "--json", "--dtype", dtype, "--source", "hu.*.txt") == 0
        [measured] = json.loads(capsys.readouterr().out)["sources"].values()
        losses[dtype] = (measured["before"], measured["after"])
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]


def test_documents_of_json_lines_are_in_the_field_that_is_named(place, capsys):
    losses = []
    for flags in (["--source", "hu.*.txt"], ["--source", "hu.*.jsonl", "--text-field", "body"]):
        assert run(place, "--json", *flags) == 0
        losses.append(next(iter(json.loads(capsys.readouterr().out)["sources"].values())))
    assert losses[0] == losses[1]


def test_switches_are_printed_put_in_the_json_and_drawn(place, tmp_path, capsys):
    flags = ["--switches", "--stretch", "8", "--plots", tmp_path]
    assert run(place, *flags, files=("hu",)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line] == [
        "SOURCE",
        "ca.a",
        "en.a",
        "hu.a",
        "nb.a",
        "ADAPTER",
        "hu",
    ]
    assert (tmp_path / "switches.svg").stat().st_size > 0
    assert run(place, *flags, "--interference", "--markdown", tmp_path / "page.md", files=("hu",)) == 0
    assert "(switches.svg)" in (tmp_path / "page.md").read_text()
    capsys.readouterr()
    assert run(place, *flags, "--json", files=("hu",)) == 0
    read = json.loads(capsys.readouterr().out)
    assert set(read["sources"]) == {"hu.a", "en.a", "nb.a", "ca.a"}
    switch = read["switches"]["adapters"]["hu"]
    assert (switch["original"], switch["own"], len(switch["rates"])) == (["en.a"], ["hu.a"], 24)
    assert 0 < switch["windows"] <= 2


def test_text_in_the_chat_template_is_measured_as_such(place, capsys):
    """Equal to the plain measurement of a file that holds the same tokens, as the naive rendering gives them."""
    words = (place / "corpus" / "hu.a.heldout.txt").read_text().replace("\n", "")[:74]
    (place / "chat").mkdir()
    (place / "chat" / "hu.a.heldout.txt").write_text(words)
    (place / "rendered").mkdir()
    (place / "rendered" / "hu.a.heldout.txt").write_text(f"<user>{words[:7]}\n<assistant>{words[7:]}"[:74])
    losses = []
    for folder, flags in (("chat", ["--chat"]), ("rendered", [])):
        more = ["--corpus", place / folder, "--window", "74", "--json", *flags]
        assert run(place, *more, files=("hu",)) == 0
        read = json.loads(capsys.readouterr().out)
        assert read.get("chat", False) == bool(flags)
        losses.append(read["sources"]["hu.a"])
    assert losses[0] == losses[1]


def test_each_alone_is_measured_as_if_the_others_were_not_there(place, tmp_path, capsys):
    alone = {}
    for name in ("hu", "da"):
        assert run(place, "--json", files=(name,)) == 0
        alone[name] = json.loads(capsys.readouterr().out)
    assert run(place, "--alone", "--json") == 0
    assert json.loads(capsys.readouterr().out)["alone"] == alone
    assert run(place, "--alone", "--plots", tmp_path) == 0
    _, hu, da = (line.split() for line in capsys.readouterr().out.splitlines())
    sources = alone["hu"]["sources"]
    change = {name: source["difference"]["share"] for name, source in sources.items()}
    fired = {name: source["fired"]["hu"] for name, source in sources.items()}
    others = [(of["nb.a"] + of["ca.a"]) / 2 for of in (change, fired)]
    expected = [(change["hu.a"], fired["hu.a"]), (change["en.a"], fired["en.a"]), others]
    assert hu == ["hu", "0.5", "0", *(text for a, b in expected for text in (f"{a:+.2%}", f"{b:.2%}"))]
    assert da[:5] == ["da", "0.5", "0", "-", "-"]
    assert {path.name for path in tmp_path.iterdir()} == {"gates-hu.svg", "gates-da.svg"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alone", "--interference"], "--interference is of all adapters attached: it does not go with --alone"),
        (["--alone", "--card", "x.md"], "--card is of all adapters attached"),
        (["--alone", "--tasks", "x.jsonl"], "--tasks is of all adapters attached"),
        (["--near", "nb=da"], "--near does nothing without --interference"),
        (["--markdown", "x.md"], "--markdown does nothing without --interference"),
        (["--chat", "--card", "x.md"], "--card is of plain text: it does not go with --chat"),
        (["--chat", "--interference", "--markdown", "x.md"], "--markdown is of plain text"),
        (["--chat", "--switches"], "--switches is of plain text"),
        (["--chat"], "the chat template takes more than half of 16 tokens"),
        (["--stretch", "16"], "--stretch does nothing without --switches"),
        (["--switches"], "no source of what da learned"),
        (["--source", "*.jsonl", "--text-field", "text"], "b.heldout.jsonl, line 1 has no field 'text'"),
        (["--window", "513"], "--window is 513 tokens; the base reads at most 512"),
        (["--switches", "--stretch", "171"], "three times --stretch is 513 tokens; the base reads at most 512"),
        (["--limit", "3"], "--limit does nothing without --tasks"),
        (["--plot-format", "png"], "--plot-format does nothing without --plots"),
        (["--interference", "--near", "nb"], "--near takes LANGUAGE=RELATIVE"),
        (["--interference", "--near", "hu=hu"], "--near hu=hu: a language is no relative of itself"),
        (["--interference", "--near", "nb=sv"], "no adapter here learned sv"),
        (["--interference", "--near", "xx=da"], "no source measured is of the language xx"),
        (["--source", "xx.*"], "xx."),
        (["--tasks", "absent.jsonl"], "cannot read absent.jsonl"),
    ],
)
def test_what_does_nothing_or_names_nothing_is_refused(place, capsys, flags, message):
    assert run(place, *flags) == 1
    seen = capsys.readouterr()
    assert message in seen.err
    assert seen.out == ""
    assert "text 1 of" not in seen.err  # nothing was measured before


def test_without_text_or_tasks_there_is_nothing_to_measure_on(place, capsys):
    assert run(place, corpus=False) == 1
    assert "give --corpus, --tasks or both" in capsys.readouterr().err
    assert run(place, "--windows", "4", "--tasks", place / "task.jsonl", corpus=False) == 1
    assert "--windows does nothing without --corpus" in capsys.readouterr().err


def test_text_that_is_not_there_is_said_before_the_base_is_loaded(place, capsys):
    assert run(place, "--source", "xx.*", "--model", place / "no-base") == 1
    assert "matches 'xx.*'" in capsys.readouterr().err


def test_two_adapters_of_one_name_are_refused(place, capsys):
    assert run(place, files=("hu", "hu")) == 1
    assert "two adapters have the same name: hu" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--plots", "--card", "--markdown"])
def test_a_place_that_takes_no_file_is_refused_before_anything_is_measured(place, capsys, flag):
    for taken in (place / "task.jsonl" / "x", place / "task.jsonl" if flag == "--plots" else place):
        assert run(place, "--interference", flag, taken) == 1
        seen = capsys.readouterr().err
        assert "error: cannot write" in seen
        assert str(taken) in seen
        assert "text 1 of" not in seen


def test_a_page_does_not_replace_what_is_measured_or_the_other_page(place, tmp_path, capsys):
    folder, page = tmp_path / "tasks", tmp_path / "x.md"
    shutil.copytree(place, folder, ignore=shutil.ignore_patterns("base"))
    (tmp_path / "link.md").symlink_to(folder / "hu.safetensors")
    text = folder / "corpus" / "hu.a.heldout.txt"
    taken = [folder / "da.safetensors", tmp_path / "link.md", folder / "task.jsonl", text]
    for flags in [["--card", each] for each in taken] + [["--card", page, "--markdown", page]]:
        files = [folder / "hu.safetensors", folder / "da.safetensors", "--tasks", folder]
        asked = ["evaluate", *files, "--corpus", folder / "corpus", "--interference", *flags]
        assert main([*map(str, asked)]) == 1
        assert f"cannot write {flags[-1]}: this command uses that file already" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--card", "--markdown"])
def test_a_page_replaces_pages_only(place, tmp_path, capsys, flag):
    config = tmp_path / "config.json"
    config.write_text("{}")
    files = [place / "hu.safetensors", "--corpus", place / "corpus", "--interference"]
    assert main([*map(str, ["evaluate", *files, flag, config])]) == 1
    assert (
        f"cannot write {config}: it is there already, and its name does not end in .md" in capsys.readouterr().err
    )
    assert config.read_text() == "{}"


def test_a_package_that_is_not_there_is_named_before_anything_is_measured(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nr_serve.commands.command.find_spec", lambda name: None)
    assert run(place, "--tasks", place / "task.jsonl") == 1
    assert "--tasks needs lm_eval, of the extra `train`" in capsys.readouterr().err
    assert run(place, "--plots", tmp_path) == 1
    assert "--plots needs matplotlib" in capsys.readouterr().err


def test_the_commands_of_the_page_on_measuring_are_understood():
    page = (Path(__file__).parents[2] / "docs" / "measure.md").read_text(encoding="utf-8")
    lines = [line.split(";")[0] for line in re.findall(r"^    .*?(nr-serve .+)$", page, re.M)]
    assert {line.split()[1] for line in lines} == {"evaluate", "calibrate", "compare"}
    for line in lines:
        _, name, *args = shlex.split(line.replace("$a", "0.5"))
        assert isinstance(parse(COMMANDS[name][0], name, args), COMMANDS[name][0])


def test_a_file_that_no_card_can_tell_of_is_refused_before_anything_is_measured(
    place, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("nr_serve.evaluate.evaluation.load", lambda *_: pytest.fail("it was measured"))
    made, path = tiny.adapter(tiny.model(), 0), tmp_path / "hu.safetensors"
    for field, wrong in {"results": {"tokens": "many"}, "recipe": {"gate": 3, "data": {}}}.items():
        write_adapter(path, replace(made.info, **{field: wrong}), made.blocks)
        asked = ["evaluate", str(path), "--corpus", str(place / "corpus"), "--card", str(tmp_path / "card.md")]
        assert main(asked) == 1
        assert f"error: {path}: its recipe or its results are not those of a run" in capsys.readouterr().err


def test_paths_that_lead_nowhere_are_refused_in_a_line(place, tmp_path, capsys):
    loop, deep = tmp_path / "loop", Path(*["d" * 200] * 30)
    loop.symlink_to(loop)
    for asked in (["compare", loop], ["compare", deep], ["evaluate", place / "hu.safetensors", "--tasks", deep]):
        assert main([*map(str, asked), *(["--corpus", str(place)] if "compare" in asked else [])]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
