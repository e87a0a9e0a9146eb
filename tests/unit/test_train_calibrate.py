"""Calibration: gates fitted anew beside other adapters; nothing else of an adapter changes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nr_serve.cli import main
from nr_serve.errors import BadRequest
from nr_serve.evaluate.heldout import attach_all
from nr_serve.evaluate.hosted import load
from nr_serve.neutral.format import read_adapter, write_adapter
from nr_serve.train import gates, text
from nr_serve.train.calibrate import calibrate
from nr_serve.train.frozen_base import load_base
from nr_serve.train.gates import Fitter
from nr_serve.train.run import train
from tests.tiny_run import write_recipe


def test_calibration_moves_only_the_gates_and_shuts_them_on_a_neighbours_text(tmp_path, base, corpus):
    wide = {
        "tokens": 5120,
        "lr": 0.03,
        "gate__threshold": 0.02,
        "data__background": [],
        "run__background_share": 0.0,
    }
    old = train(write_recipe(tmp_path, base, **wide), tmp_path / "hu", corpus)
    changes = {"domain": "da", "data__target": ["da.*.train.txt"], "data__background": ["hu.a.train.txt"]}
    neighbour = train(write_recipe(tmp_path, base, **changes), tmp_path / "da", corpus)
    new = calibrate(old, [neighbour], corpus, tmp_path / "new.safetensors", base=str(base), carry=0.25)
    before, after = read_adapter(old), read_adapter(new)
    assert after.version != before.version
    assert (after.info.carry, after.info.recipe["blocks"]["carry"]) == (0.25, 0.25)
    assert before.info.threshold == after.info.threshold == after.info.recipe["gate"]["threshold"] == 0.02
    assert after.info.recipe["data"]["background"] == ["da.a.train.txt"]
    measured = ["heldout" in file.info.results for file in (before, after)]
    assert measured == [True, False], "what was measured with the old gates"
    assert after.info.results["calibrated"]["beside"] == {"da": read_adapter(neighbour).version}
    for a, b in zip(before.blocks, after.blocks, strict=True):
        assert torch.equal(a.w_in, b.w_in)
        assert torch.equal(a.w_gate, b.w_gate)
        assert torch.equal(a.w_out, b.w_out)
        assert not torch.equal(a.gate, b.gate)
    fired = {}
    for file in (old, new):
        hosted = load([file, neighbour], str(base))
        texts = ["da.*.heldout.txt", "hu.*.heldout.txt"]
        report = attach_all(hosted, text.read_heldout(corpus, texts, hosted.base.tokenizer, 16, 32))
        fired[file] = {source: report.sources[source].fired[file.stem] for source in report.sources}
    assert fired[old]["da.a"] > 0.2
    assert fired[new]["da.a"] < 0.1
    assert fired[new]["hu.a"] > 0.5


def test_calibration_reads_as_much_of_a_neighbours_language_as_of_the_target(tmp_path, base, corpus, monkeypatch):
    old = train(write_recipe(tmp_path, base, tokens=256), tmp_path / "hu", corpus)
    changes = {"domain": "da", "data__target": ["da.*.train.txt"], "data__background": ["hu.a.train.txt"]}
    neighbour = train(write_recipe(tmp_path, base, tokens=256, **changes), tmp_path / "da", corpus)
    counts, fit = [], gates.fit_gates

    def counting(model, attached, classes, *args, **more):
        counts.append({name: len(text.windows) for name, text in classes.items()})
        return fit(model, attached, classes, *args, **more)

    monkeypatch.setattr(gates, "fit_gates", counting)
    for beside in ([], [neighbour]):
        calibrate(old, beside, corpus, tmp_path / "new.safetensors", base=str(base), changes={"fit_tokens": 64})
    alone, both = counts
    assert (alone["target"], alone["da"]) == (16, 4)
    assert (both["target"], both["da"]) == (16, 16)


def test_calibration_sets_a_threshold_if_told(tmp_path, base, corpus):
    old = train(write_recipe(tmp_path, base, tokens=256), tmp_path / "hu", corpus)
    new = calibrate(old, [], corpus, tmp_path / "new.safetensors", base=str(base), changes={"threshold": 0.3})
    assert (read_adapter(old).info.threshold, read_adapter(new).info.threshold) == (0, 0.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_calibration_reads_the_text_in_the_type_of_the_recipe(tmp_path, base, corpus, dtype, monkeypatch):
    old = train(write_recipe(tmp_path, base, tokens=128, run__dtype=dtype), tmp_path / "hu", corpus)
    streams = set()
    fit = Fitter.fit
    monkeypatch.setattr(Fitter, "fit", lambda self, layer, x_Td: streams.add(x_Td.dtype) or fit(self, layer, x_Td))
    calibrate(old, [], corpus, tmp_path / "new.safetensors", base=str(base))
    assert streams == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "none"}, "gate.kind cannot be changed"),
        ({"trained": True}, "gate.trained cannot be changed"),
        ({"refit": False}, "gate.refit does nothing here"),
        ({"min_found": 0.9}, "gate.min_found does nothing here"),
    ],
)
def test_calibration_refuses_what_only_training_decides(tmp_path, base, corpus, change, message):
    path = train(write_recipe(tmp_path, base, tokens=256), tmp_path / "run", corpus)
    with pytest.raises(BadRequest, match=message):
        calibrate(path, [], corpus, tmp_path / "out.safetensors", changes=change)


def test_calibration_needs_the_adapters_recipe(tmp_path, base, corpus):
    from tests import tiny

    model = tiny.model()
    made = tiny.adapter(model, 3)
    write_adapter(tmp_path / "x.safetensors", made.info, made.blocks)
    with pytest.raises(BadRequest, match="x carries no recipe"):
        calibrate(tmp_path / "x.safetensors", [], corpus, tmp_path / "y.safetensors", base=str(base))
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("changes", [{"method": "adapter"}, {"gate__kind": "none"}])
def test_an_adapter_without_gates_is_not_calibrated(tmp_path, base, corpus, changes):
    old = train(write_recipe(tmp_path, base, tokens=128, **changes), tmp_path / "hu", corpus)
    with pytest.raises(BadRequest, match="was trained without gates"):
        calibrate(old, [], corpus, tmp_path / "new.safetensors", base=str(base))
    assert not (tmp_path / "new.safetensors").exists()


def test_an_adapter_that_has_a_block_keeps_it(tmp_path, base, corpus):
    path = train(write_recipe(tmp_path, base, tokens=128), tmp_path / "hu", corpus)
    old = read_adapter(path)
    picky = old.info.recipe | {"gate": old.info.recipe["gate"] | {"min_found": 0.999}}
    write_adapter(path, replace(old.info, recipe=picky), old.blocks)
    changes = {"percentile": 99.9}
    new = calibrate(path, [], corpus, tmp_path / "new.safetensors", base=str(base), changes=changes)
    assert all(block is not None for block in read_adapter(new).blocks)
    assert read_adapter(new).info.recipe["gate"]["min_found"] == 0.999


def test_a_layer_without_a_block_stays_without_one(tmp_path, base, corpus):
    old = read_adapter(train(write_recipe(tmp_path, base, tokens=128), tmp_path / "hu", corpus))
    write_adapter(tmp_path / "bare.safetensors", old.info, (old.blocks[0], None, old.blocks[2]))
    new = calibrate(tmp_path / "bare.safetensors", [], corpus, tmp_path / "new.safetensors", base=str(base))
    assert [block is None for block in read_adapter(new).blocks] == [False, True, False]


@pytest.mark.parametrize(("init", "then"), [("paper", "logistic"), ("closed-form", "closed-form")])
def test_random_gates_are_fitted_and_the_file_keeps_its_threshold_and_results(tmp_path, base, corpus, init, then):
    changes = {"gate__init": init, "gate__trained": init == "paper"}
    old = read_adapter(train(write_recipe(tmp_path, base, tokens=128, **changes), tmp_path / "hu", corpus))
    info = replace(old.info, threshold=0.125, results=old.info.results | {"note": "kept"})
    write_adapter(tmp_path / "hu.safetensors", info, old.blocks)
    new = read_adapter(
        calibrate(tmp_path / "hu.safetensors", [], corpus, tmp_path / "new.safetensors", base=str(base))
    )
    assert new.info.recipe["gate"]["init"] == then
    assert new.info.threshold == new.info.recipe["gate"]["threshold"] == 0.125
    assert new.info.results == {"tokens": 128, "note": "kept", "calibrated": {"beside": {}}}


def test_gates_are_fitted_to_the_stream_as_the_neighbours_leave_it(tmp_path, base, corpus):
    old = train(write_recipe(tmp_path, base, tokens=128), tmp_path / "hu", corpus)
    changes = {"domain": "da", "data__target": ["da.*.train.txt"], "data__background": ["hu.a.train.txt"]}
    made = read_adapter(train(write_recipe(tmp_path, base, tokens=128, **changes), tmp_path / "da", corpus))
    gates = []
    for scale in (0.0, 10.0):
        blocks = tuple(replace(block, w_out=torch.full_like(block.w_out, scale)) for block in made.blocks)
        write_adapter(tmp_path / "neighbour.safetensors", made.info, blocks)
        new = calibrate(
            old, [tmp_path / "neighbour.safetensors"], corpus, tmp_path / "new.safetensors", base=str(base)
        )
        gates.append([block.gate for block in read_adapter(new).blocks])
    assert [torch.equal(a, b) for a, b in zip(*gates, strict=True)] == [True, False, False]


def test_neighbours_of_the_same_text_and_text_that_is_read_already_add_no_more(tmp_path, base, corpus):
    corpus = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    shutil.copy(corpus / "en.b.heldout.txt", corpus / "xx.a.train.txt")
    recipe = write_recipe(tmp_path, base, tokens=128, data__heldout=["hu.*.heldout.txt"])
    old = train(recipe, tmp_path / "hu", corpus)
    made, neighbours = read_adapter(old), []
    read = [("hu2", "hu.a.train.txt"), ("en", "en.a.train.txt"), ("da", "da.a.train.txt")]  # each in another part
    for name, target in [*read, ("one", "xx.a.train.txt"), ("two", "xx.a.train.txt")]:
        its = made.info.recipe | {"data": {"target": [target], "original": ["hu.*.train.txt"]}}
        neighbours.append(tmp_path / f"{name}.safetensors")
        write_adapter(neighbours[-1], replace(made.info, recipe=its), made.blocks)
    new = calibrate(old, neighbours, corpus, tmp_path / "new.safetensors", base=str(base))
    assert read_adapter(new).info.recipe["data"]["background"] == ["da.*.train.txt", "xx.a.train.txt"]


def as_jsonl(corpus: Path, folder: Path, field: str) -> Path:
    """The corpus with the Danish text as JSON lines."""
    shutil.copytree(corpus, folder)
    documents = (folder / "da.a.train.txt").read_text().split("\n\n")
    (folder / "da.a.train.txt").unlink()
    rows = "".join(json.dumps({field: document}) + "\n" for document in documents)
    (folder / "da.a.train.jsonl").write_text(rows)
    return folder


@pytest.mark.parametrize("field", ["text", "body"])
def test_a_neighbours_text_is_read_by_its_own_field(tmp_path, base, corpus, field, monkeypatch):
    folder = as_jsonl(corpus, tmp_path / "corpus", field)
    alone = {"tokens": 128, "data__background": [], "run__background_share": 0.0}
    old = train(write_recipe(tmp_path, base, **alone), tmp_path / "hu", corpus)
    changes = {"domain": "da", "data__target": ["da.*.train.jsonl"], "data__text_field": field}
    neighbour = train(write_recipe(tmp_path, base, **alone, **changes), tmp_path / "da", folder)
    read, classes = text.read_classes, []
    monkeypatch.setattr(text, "read_classes", lambda *a, **more: classes.append(read(*a, **more)) or classes[0])
    new = read_adapter(calibrate(old, [neighbour], folder, tmp_path / "new.safetensors", base=str(base)))
    recipe = write_recipe(tmp_path, base, **alone | {"data__background": ["da.a.train.txt"]})
    expected = read(corpus, recipe.data, load_base(str(base)).tokenizer, recipe.run).background["da"]
    assert torch.equal(classes[0].background["da"].ids_NT, expected.ids_NT)
    assert new.info.recipe["data"]["background"] == (["da.a.train.jsonl"] if field == "text" else [])


def test_an_adapter_is_not_its_own_neighbour(tmp_path, base, corpus):
    old = train(write_recipe(tmp_path, base, tokens=128), tmp_path / "hu", corpus)
    with pytest.raises(BadRequest, match="two adapters have the same name: hu"):
        calibrate(old, [old], corpus, tmp_path / "new.safetensors", base=str(base))


@pytest.mark.parametrize("command", [["calibrate", "f", "--corpus", "c", "--out"], ["export-adapter", "r"]])
def test_a_file_that_cannot_be_written_is_said_before_anything_is_read(tmp_path, capsys, command):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "x.safetensors", tmp_path / "file" / "x.safetensors", tmp_path):
        assert main([*command, str(path)]) == 1
        assert f"cannot write {path}" in capsys.readouterr().err


def test_an_adapter_beside_is_not_overwritten(tmp_path, capsys):
    beside, link = tmp_path / "b.safetensors", tmp_path / "link.safetensors"
    beside.write_bytes(b"an adapter")
    link.symlink_to(beside)
    for out in (beside, link):
        asked = ["f", "--beside", "x", "--beside", str(beside), "--corpus", "c", "--out", str(out)]
        assert main(["calibrate", *asked]) == 1
        assert f"cannot write {out}: this command uses that file already" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["log.jsonl", "checkpoint-2/trained.safetensors"])
def test_an_export_does_not_overwrite_its_run(tmp_path, capsys, file):
    theirs = tmp_path / "run" / file
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"the run's")
    assert main(["export-adapter", str(tmp_path / "run"), str(theirs)]) == 1
    assert f"cannot write {theirs}: this command uses that file already" in capsys.readouterr().err
    assert theirs.read_bytes() == b"the run's"


def test_a_file_that_is_no_adapter_is_not_replaced_by_one(tmp_path, capsys):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a base's weights")
    for asked in (
        ["calibrate", "f", "--corpus", "c", "--out", str(weights)],
        ["export-adapter", "run", str(weights)],
    ):
        assert main(asked) == 1
        said = f"cannot write {weights}: it is there already, and is no adapter file"
        assert said in capsys.readouterr().err
    assert weights.read_bytes() == b"a base's weights"


def test_a_carrys_cost_is_a_table_with_a_row_each(tmp_path, base, corpus, capsys):
    old = train(write_recipe(tmp_path, base, tokens=512), tmp_path / "hu", corpus)
    files = [tmp_path / f"carry-{carry}.safetensors" for carry in ("0", "0.9")]
    for carry, file in zip(("0", "0.9"), files, strict=True):
        asked = [str(old), "--corpus", str(corpus), "--model", str(base), "--carry", carry, "--out", str(file)]
        assert main(["calibrate", *asked]) == 0
    capsys.readouterr()
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    (folder / "en.long.heldout.txt").write_text("thethe  hthte eht" * 200)  # no other document holds two stretches
    asked = ["--corpus", str(folder), "--model", str(base), "--alone", "--switches", "--window", "16"]
    assert main(["evaluate", *map(str, files), *asked, "--stretch", "32", "--windows", "8"]) == 0
    alone, switches = (table.splitlines() for table in capsys.readouterr().out.split("\n\n"))
    assert [line.split()[:2] for line in alone[1:]] == [["carry-0", "0"], ["carry-0.9", "0.9"]]
    header, *rows = (line.split("  ") for line in switches)
    header, *rows = ([cell.strip() for cell in line if cell.strip()] for line in (header, *rows))
    opens = [int(row[header.index("TOKENS TO OPEN")]) for row in rows]
    assert opens[0] < opens[1]
