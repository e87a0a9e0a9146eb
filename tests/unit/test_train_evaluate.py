"""Evaluation: losses before and after, who fires, the card, and exports from a run that goes on."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from nr_serve.assemble import load_tokenizer
from nr_serve.config import ServeConfig
from nr_serve.engine.model.base import load_base as load_served
from nr_serve.errors import BadAdapterFile, BadRequest, Conflict, UnsupportedBase
from nr_serve.evaluate.card import card
from nr_serve.evaluate.heldout import Report, attach_all
from nr_serve.evaluate.hosted import Hosted, load
from nr_serve.neutral.format import read_adapter, write_adapter
from nr_serve.train.calibrate import calibrate
from nr_serve.train.export import export_run
from nr_serve.train.frozen_base import FrozenBase, best_device, load_base
from nr_serve.train.recipe import BadRecipe
from nr_serve.train.restore import load_run
from nr_serve.train.run import train
from nr_serve.train.text import read_heldout
from tests import tiny
from tests.tiny_run import write_recipe


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for seed in (1, 2):
        made = tiny.adapter(tiny.model(), seed, carry=0.5 * (seed - 1))
        paths.append(tmp_path / f"a{seed}.safetensors")
        write_adapter(paths[-1], made.info, made.blocks)
    return paths


def evaluate(files: list[Path], base: Path, corpus: Path, source: str, windows: int) -> Report:
    """Windows of 16 tokens of a source, with all of the files attached."""
    hosted = load(files, str(base))
    return attach_all(hosted, read_heldout(corpus, [source], hosted.base.tokenizer, 16, windows))


def test_losses_equal_the_naive_loop_with_both_adapters_attached(files, base, corpus):
    report = evaluate(files, base, corpus, "hu.*.heldout.txt", 3)
    loaded = [read_adapter(path) for path in files]
    windows = read_heldout(corpus, ["hu.*.heldout.txt"], tiny.tokenizer().hf, 16, 3)["hu.a"]
    for attached, loss in (((), report.sources["hu.a"].before), (loaded, report.sources["hu.a"].after)):
        logits = partial(tiny.Naive(tiny.model()).logits, adapters=attached)
        assert loss == pytest.approx(tiny.naive_loss(logits, windows), rel=1e-5)
    assert 0.1 < report.sources["hu.a"].fired["a1"] < 0.9


def test_the_report_is_one_json_document_and_the_card_a_page(files, base, corpus):
    report = evaluate(files, base, corpus, "*.heldout.txt", 2)
    read = json.loads(json.dumps(report.document()))
    assert set(read["sources"]) == {"hu.a", "en.a", "en.b", "da.a"}
    assert set(read["sources"]["hu.a"]["fired"]) == {"a1", "a2"}
    assert list(read["adapters"]) == ["a1", "a2"]
    page = card("a1", read_adapter(files[0]), report)
    assert "attached together with `a2`" in page
    assert f"| hu.a | {report.sources['hu.a'].before:.3f} |" in page


def test_the_card_puts_the_domains_own_text_first(files, base, corpus):
    path = files[0]
    made = read_adapter(path)
    info = made.info.__class__(**{**vars(made.info), "domain": "hu"})
    write_adapter(path, info, made.blocks)
    report = evaluate([path], base, corpus, "*.heldout.txt", 2)
    rows = [line.split("|")[1].strip() for line in card("a1", read_adapter(path), report).splitlines()[-4:]]
    assert rows == ["hu.a", "da.a", "en.a", "en.b"]


def test_what_does_not_fit_is_refused(files, base, corpus, tmp_path):
    other = tiny.save(tiny.model(seed=9), tmp_path / "other")
    with pytest.raises(BadAdapterFile, match="made for another base"):
        load(files, str(other))
    tokenizer = tiny.tokenizer().hf
    with pytest.raises(BadRecipe, match="no text"):
        read_heldout(corpus, ["xx.*"], tokenizer, 256, 32)
    with pytest.raises(BadRecipe, match=r"hu\.a fills 0 windows"):
        read_heldout(corpus, ["hu.*.heldout.txt"], tokenizer, 100_000, 32)


def test_an_export_from_a_checkpoint_is_the_file_the_run_ends_with(base, corpus, tmp_path):
    path = train(write_recipe(tmp_path, base, tokens=512), tmp_path / "run", corpus)
    exported = export_run(tmp_path / "run", tmp_path / "mid.safetensors")
    ours, theirs = read_adapter(exported), read_adapter(path)
    assert ours.info.base_fingerprint == theirs.info.base_fingerprint
    assert all(torch.equal(a.w_out, b.w_out) for a, b in zip(ours.blocks, theirs.blocks, strict=True))


def test_an_export_at_another_threshold_leaves_out_what_was_measured_at_the_old(base, corpus, tmp_path):
    train(write_recipe(tmp_path, base, tokens=512), tmp_path / "run", corpus)
    dialled = read_adapter(export_run(tmp_path / "run", tmp_path / "dialled.safetensors", threshold=0.25))
    assert dialled.info.threshold == 0.25
    assert dialled.info.recipe["gate"]["threshold"] == 0.25
    assert set(dialled.info.results) == {"tokens"}
    with pytest.raises(Conflict, match="no checkpoint"):
        export_run(tmp_path, tmp_path / "x.safetensors")


@pytest.mark.parametrize("measured", [True, False])
def test_an_export_of_a_step_that_was_not_measured_has_no_measurements(base, corpus, tmp_path, measured):
    every = 256 if measured else 512
    recipe = write_recipe(tmp_path, base, tokens=512, gate__refit=False, run__validate_every=every)
    train(recipe, tmp_path / "run", corpus)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")  # what is left is as if it were stopped in its middle
    exported = read_adapter(export_run(tmp_path / "run", tmp_path / "x.safetensors")).info.results
    assert exported["tokens"] == 256
    assert ("heldout" in exported) == measured


def test_a_run_trains_with_its_threshold_and_its_file_has_it(base, corpus, tmp_path):
    made = [
        read_adapter(
            train(write_recipe(tmp_path, base, tokens=512, gate__refit=False, **gate), tmp_path / out, corpus)
        )
        for out, gate in (("plain", {"gate__threshold": 0.0}), ("dialled", {"gate__threshold": 2.5}))
    ]
    plain, dialled = made
    assert [each.info.threshold for each in made] == [0, 2.5]
    assert all(torch.equal(a.gate, b.gate) for a, b in zip(plain.blocks, dialled.blocks, strict=True))
    assert not any(torch.equal(a.w_out, b.w_out) for a, b in zip(plain.blocks, dialled.blocks, strict=True))
    fired = [each.info.results["heldout"]["hu.a"]["fired"] for each in made]
    assert fired[1] < fired[0], "measured in training as served"
    assert load_run(tmp_path / "dialled")[2].adapter.threshold == 2.5


def test_blocks_without_gates_take_no_threshold(base, corpus, tmp_path):
    recipe = write_recipe(tmp_path, base, tokens=512, method="adapter", gate__threshold=2.5)
    assert read_adapter(train(recipe, tmp_path / "run", corpus)).info.threshold == 0
    with pytest.raises(BadRequest, match="no threshold"):
        export_run(tmp_path / "run", tmp_path / "x.safetensors", threshold=2.5)


def test_attaching_leaves_the_base_as_it_is_where_nothing_fires(corpus):
    made = tiny.adapter(tiny.model(), 1, threshold=1e6)
    model = tiny.model()
    frozen = FrozenBase("tiny", model, tiny.tokenizer().hf, "f", "c")
    texts = read_heldout(corpus, ["en.*.heldout.txt"], frozen.tokenizer, 16, 2)
    source = attach_all(Hosted(frozen, {"a": made}), texts).sources["en.a"]
    assert source.before == source.after
    assert source.fired == {"a": 0}


def test_the_best_device_is_a_gpu_where_there_is_one(monkeypatch):
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert best_device() == torch.device(device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_what_is_measured_on_a_gpu_is_what_is_measured_on_the_cpu(files, base, corpus, tmp_path, monkeypatch):
    reports = []
    for device in ("cuda", "cpu"):
        monkeypatch.setattr("nr_serve.evaluate.hosted.best_device", lambda device=device: torch.device(device))
        reports.append(evaluate(files, base, corpus, "hu.*.heldout.txt", 4))
    on_gpu, on_cpu = (report.sources["hu.a"] for report in reports)
    assert on_gpu.after == pytest.approx(on_cpu.after, rel=1e-3)
    assert on_gpu.fired["a1"] == pytest.approx(on_cpu.fired["a1"], abs=0.02)
    path = train(write_recipe(tmp_path, base, tokens=512), tmp_path / "run", corpus)
    new = calibrate(path, [], corpus, tmp_path / "new.safetensors", base=str(base))
    assert read_adapter(new).info.domain == "hu"
    assert load_run(tmp_path / "run")[1].device.type == "cuda"


def test_a_base_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UnsupportedBase, match="cannot load"):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"cut off"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}'),
        ("config.json", b'{"model_type": "llama", "hidden_size": 64}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"[1]"),
    ],
)
def test_a_damaged_base_is_refused_in_a_line_wherever_it_is_loaded(tmp_path, base, name, content):
    damaged = Path(shutil.copytree(base, tmp_path / "base"))
    (damaged / name).write_bytes(content)
    of_tokenizer = name.startswith("tokenizer")
    serves = load_tokenizer if of_tokenizer else lambda folder: load_served(folder, ServeConfig(dtype="float32"))
    for loads in (lambda folder: load_base(str(folder)), serves):
        with pytest.raises(UnsupportedBase, match=r"cannot load .*base: .") as refused:
            loads(damaged)
        assert "\n" not in refused.value.message


def test_a_tokenizer_with_more_tokens_than_the_base_knows_is_refused(tmp_path):
    folder = tiny.save(tiny.model(vocab_size=200, eos_token_id=199), tmp_path / "base")
    with pytest.raises(UnsupportedBase, match="the tokenizer has 300 tokens; the base knows 200"):
        load_base(str(folder))
    folder = tiny.save(tiny.model(), tmp_path / "base")
    hf = tiny.tokenizer().hf
    hf.add_tokens("<image>")
    hf.save_pretrained(folder)
    assert len(load_base(str(folder)).tokenizer) == 301


def test_a_base_that_cannot_be_served_is_refused_before_anything_is_trained_beside_it(tmp_path, base):
    refused = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((refused / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (refused / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedBase, match="dynamic rotary"):
        load_base(str(refused))


@pytest.mark.parametrize("part", ["model.norm", "model.embed_tokens", "model.layers.1.mlp.up_proj", "rope"])
def test_a_base_is_known_by_all_that_it_computes_with(part, base, tmp_path):
    known = load_base(str(base)).contents
    assert load_base(str(base), "bfloat16").contents == known
    changed = tiny.model()
    if part == "rope":
        changed.config.rope_parameters["rope_theta"] = 10.0
    else:
        weight = changed.get_submodule(part).weight.data
        weight.flatten()[-1] += 1
    assert load_base(str(tiny.save(changed, tmp_path / "changed"))).contents != known
