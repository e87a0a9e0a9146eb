"""A whole training run on a tiny base: resuming, refusals, divergence, the file that comes out."""

import json
import math
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.models.llama.modeling_llama import LlamaMLP

from nr_serve.disk import CannotWrite
from nr_serve.errors import BadRequest, Conflict
from nr_serve.neutral.format import read_adapter
from nr_serve.train import checkpoint as checkpoints
from nr_serve.train import export, gate_cache, log, losses, trainer
from nr_serve.train import run as training
from nr_serve.train.export import export_run
from nr_serve.train.frozen_base import load_base
from nr_serve.train.gates import fit_gates, gate_classes
from nr_serve.train.methods import make_learner
from nr_serve.train.recipe import Run
from nr_serve.train.restore import load_run, load_weights
from nr_serve.train.run import train
from nr_serve.train.run_text import read_run_text
from nr_serve.train.trainer import TrainingDiverged, learning_rate
from tests import tiny
from tests.tiny_run import killed_before, weights, write_recipe
from tests.unit.room import no_room


def flip_a_bit(path: Path) -> None:
    """Change one bit of a number in a file of tensors."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("gate", ["", "init = 'paper'\ntrained = true"], ids=["closed-form", "paper"])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(tmp_path, base, corpus, gate, monkeypatch):
    recipe = write_recipe(tmp_path, base, gate=gate)
    train(recipe, tmp_path / "whole", corpus)

    with killed_before(5, monkeypatch), pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "cut", corpus)
    assert checkpoints.load(checkpoints.latest(tmp_path / "cut")).step == 4
    train(recipe, tmp_path / "cut", corpus, resume=True)

    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    files = [read_adapter(tmp_path / run / "hu.safetensors") for run in ("whole", "cut")]
    assert files[0].info == files[1].info


def test_a_layer_that_the_fit_dropped_stays_out_of_a_resumed_run(tmp_path, base, corpus, monkeypatch):
    fit = training.fit_once

    def without_layer_1(*args):
        made = fit(*args)
        return replace(made, gates={name: gate for name, gate in made.gates.items() if ".1." not in name})

    monkeypatch.setattr(training, "fit_once", without_layer_1)
    recipe = write_recipe(tmp_path, base)
    whole = read_adapter(train(recipe, tmp_path / "whole", corpus))
    assert [block is None for block in whole.blocks] == [False, True, False]
    with killed_before(5, monkeypatch), pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "cut", corpus)
    assert read_adapter(train(recipe, tmp_path / "cut", corpus, resume=True)).version == whole.version


def test_gates_are_fitted_again_to_the_stream_as_the_trained_blocks_leave_it(tmp_path, base, corpus):
    recipe = write_recipe(tmp_path, base, tokens=2560, lr=0.03)
    made = read_adapter(train(recipe, tmp_path / "out", corpus))
    kept = checkpoints.load(checkpoints.latest(tmp_path / "out")).weights()

    frozen = load_base(str(base))
    adapter = make_learner(recipe, frozen)  # hosts the blocks too
    load_weights(adapter, kept)
    classes = gate_classes(read_run_text(recipe, corpus).classes, recipe.gate.fit_tokens)
    expected = fit_gates(frozen.model, adapter.attached, classes, recipe.gate, original=["en.a", "chat"]).gates
    for i, block in enumerate(made.blocks):
        assert torch.equal(block.gate, expected[f"layers.{i}.gate"])
        assert torch.equal(block.bias, expected[f"layers.{i}.bias"])
        assert torch.equal(block.w_out, kept[f"adapter.layers.{i}.w_out"].bfloat16())
    later = [
        i for i, block in enumerate(made.blocks) if not torch.equal(block.gate, kept[f"adapter.layers.{i}.gate"])
    ]
    assert later == [1, 2]  # below the first block there is nothing to move the stream


def test_a_run_killed_while_gates_are_fitted_again_fits_them_when_resumed(tmp_path, base, corpus, monkeypatch):
    recipe = write_recipe(tmp_path, base)
    whole = read_adapter(train(recipe, tmp_path / "whole", corpus))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "refit_gates", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "cut", corpus)
    cut = read_adapter(train(recipe, tmp_path / "cut", corpus, resume=True))
    assert cut.info == whole.info
    assert all(torch.equal(a.gate, b.gate) for a, b in zip(cut.blocks, whole.blocks, strict=True))
    monkeypatch.setattr(training, "refit_gates", killed)
    again = read_adapter(train(recipe, tmp_path / "cut", corpus, resume=True))  # they are there already
    assert again.version == whole.version


def test_gates_fitted_again_that_find_no_room_or_are_damaged_can_be_fitted_once_more(
    tmp_path, base, corpus, monkeypatch
):
    recipe, out = write_recipe(tmp_path, base), tmp_path / "out"
    keep = checkpoints.Checkpoint.keep_refitted

    def full(*args):
        with no_room():
            keep(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoint, "keep_refitted", full)
        with pytest.raises(CannotWrite, match=r"cannot write .*refitted\.safetensors"):
            train(recipe, out, corpus)
    made = read_adapter(train(recipe, out, corpus, resume=True))
    kept = checkpoints.latest(out) / "refitted.safetensors"
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(checkpoints.BadCheckpoint, match=r"refitted\.safetensors .*without this file the gates are"):
        train(recipe, out, corpus, resume=True)
    kept.unlink()
    assert read_adapter(train(recipe, out, corpus, resume=True)).version == made.version


def test_what_others_read_of_a_run_has_the_gates_that_were_fitted_again(tmp_path, base, corpus):
    for refit in (True, False):
        out = tmp_path / f"{refit}"
        made = read_adapter(train(write_recipe(tmp_path, base, lr=0.03, gate__refit=refit), out, corpus))
        loaded = load_run(out)[2].adapter.gates()
        exported = read_adapter(export_run(out, tmp_path / "x.safetensors"))
        modes = [path.stat().st_mode & 0o777 for path in checkpoints.latest(out).glob("*.safetensors")]
        assert modes == [0o644] * (1 + refit)
        for i, block in enumerate(made.blocks):
            assert torch.equal(block.gate, loaded[f"layers.{i}.gate"])
            assert torch.equal(block.gate, exported.blocks[i].gate)
        assert torch.equal(made.blocks[2].gate, weights(out)["adapter.layers.2.gate"]) != refit


def said(capsys) -> str:
    """The line on the gates as they were fitted to the base."""
    first, _ = (line for line in capsys.readouterr().err.splitlines() if "gates find" in line)
    return first


def test_gates_fitted_before_to_the_same_text_are_kept_and_told(tmp_path, base, corpus, monkeypatch, capsys):
    monkeypatch.setenv("NR_CACHE", str(tmp_path / "cache"))
    fits, fit = [], gate_cache.fit_gates
    monkeypatch.setattr(gate_cache, "fit_gates", lambda *args, **more: fits.append(1) or fit(*args, **more))
    made, told = [], []
    for out, changes in (
        ("a", {}),
        ("b", {}),
        ("c", {"blocks__carry": 0.3}),
        ("d", {"blocks__h": [16, 0, 16]}),
        ("e", {"run__window": 32}),
    ):
        train(write_recipe(tmp_path, base, tokens=128, **changes), tmp_path / out, corpus)
        made.append(weights(tmp_path / out))
        told.append((log.read(tmp_path / out / "log.jsonl")[0], said(capsys)))
    assert len(fits) == 4
    assert told[0] == told[1] != told[2]
    assert told[1][0]["event"] == "gates"
    assert list(told[1][0]["layers"]["0"]["misfired"]) == ["da", "en.a", "chat"]
    assert told[1][1].startswith("train: gates find")
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(made[0]["adapter.layers.0.gate"], made[2]["adapter.layers.0.gate"])
    assert not any(".1." in name for name in made[3])


def test_training_lowers_the_target_loss_and_the_file_tells_its_story(tmp_path, base, corpus, monkeypatch):
    monkeypatch.setenv("NR_CACHE", str(tmp_path / "cache"))
    path = train(write_recipe(tmp_path, base, tokens=5120, lr=0.03), tmp_path / "out", corpus)
    adapter = read_adapter(path)
    assert (adapter.info.domain, adapter.info.carry, adapter.h) == ("hu", 0.8, 16)
    assert adapter.info.recipe["run"]["tokens"] == adapter.info.results["tokens"] == 5120
    hungarian = adapter.info.results["heldout"]["hu.a"]
    assert hungarian["after"] < hungarian["before"] - 0.1
    events = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {e["event"] for e in events} == {"gates", "heldout", "step", "end"}
    assert len([e for e in events if e["event"] == "step"]) == 40


def test_losses_are_written_for_tensorboard_too_if_asked(tmp_path, base, corpus):
    for asked in (True, False):
        train(write_recipe(tmp_path, base, tokens=256), tmp_path / str(asked), corpus, tensorboard=asked)
    assert not (tmp_path / "False" / "runs").exists()
    (folder,) = (tmp_path / "True" / "runs").iterdir()
    written = EventAccumulator(str(folder)).Reload()
    logged = [json.loads(line) for line in (tmp_path / "True" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert losses
    assert [event.value for event in written.Scalars("train/loss")] == pytest.approx(losses)


def test_tokens_that_no_whole_step_takes_are_told(tmp_path, base, corpus, capsys):
    told = []
    for tokens in (300, 256):
        train(write_recipe(tmp_path, base, tokens=tokens), tmp_path / f"{tokens}", corpus)
        told.append("train: run.tokens 300 is rounded down to 256, 2 steps of 128\n" in capsys.readouterr().err)
    assert told == [True, False]


def test_a_run_does_not_go_on_with_another_base_of_the_same_shape(tmp_path, corpus):
    other, own = tiny.model(), tiny.save(tiny.model(), tmp_path / "base")
    recipe = write_recipe(tmp_path, own, tokens=256)
    train(recipe, tmp_path / "run", corpus)
    other.model.norm.weight.data[-1] += 1
    tiny.save(other, own)
    with pytest.raises(Conflict, match="the base differs"):
        train(recipe, tmp_path / "run", corpus, resume=True)
    with pytest.raises(Conflict, match="the base differs"):
        export_run(tmp_path / "run", tmp_path / "out.safetensors")


def test_a_run_is_not_overwritten_or_resumed_as_something_else(tmp_path, base, corpus, monkeypatch):
    out = tmp_path / "out"
    train(write_recipe(tmp_path, base, tokens=256), out, corpus)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(training, "load_base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(Conflict, match="holds checkpoints"):
        train(write_recipe(tmp_path, base, tokens=256), out, corpus)
    with pytest.raises(Conflict, match=r"resume: run\.lr is 0\.01 there, 0\.5 here$"):
        train(write_recipe(tmp_path, base, tokens=256, lr=0.5), out, corpus, resume=True)
    with pytest.raises(Conflict, match=r"^run\.tokens cannot change any more: "):
        train(write_recipe(tmp_path, base, tokens=512), out, corpus, resume=True)
    other = shutil.copytree(corpus, tmp_path / "other")
    for changed, by in (("da.a.train.txt", "en.a.train.txt"), ("hu.a.heldout.txt", "en.a.heldout.txt")):
        (other / changed).write_text((corpus / by).read_text())
        with pytest.raises(Conflict, match="corpus differs"):
            train(write_recipe(tmp_path, base, tokens=256), out, other, resume=True)
        shutil.copy(corpus / changed, other)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_budget_that_is_used_up_already_is_refused(tmp_path, base, corpus):
    out, rising = tmp_path / "out", {"run__schedule": "cosine", "run__warmup_tokens": 100_000}
    made = read_adapter(train(write_recipe(tmp_path, base, tokens=1280, **rising), out, corpus))
    with pytest.raises(Conflict, match=r"^run\.tokens cannot be 512: the run to resume has taken 1,280 already; "):
        train(write_recipe(tmp_path, base, tokens=512, **rising), out, corpus, resume=True)
    assert read_adapter(out / "hu.safetensors").version == made.version


@pytest.mark.parametrize("theirs", ["adapter", "hu.safetensors", "log.jsonl"])
def test_a_new_run_writes_over_nothing_that_no_run_has_left(tmp_path, base, corpus, theirs):
    out = tmp_path / "out"
    path = out / "adapter" / "thesis.txt" if theirs == "adapter" else out / theirs
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    changes = {"method": "lora"} if theirs == "adapter" else {}
    result = out / "lora" / "thesis.txt"
    if changes:
        result.parent.mkdir()
        result.write_text("mine")
    for resume in (False, True):
        with pytest.raises(Conflict, match=r"not of a run in|not the log of a run"):
            train(write_recipe(tmp_path, base, tokens=256, **changes), out, corpus, resume=resume)
    assert path.read_text() == "mine"
    assert not changes or result.read_text() == "mine"


def test_a_measurement_that_is_not_a_number_ends_the_run(tmp_path, base, corpus):
    recipe = write_recipe(
        tmp_path, base, tokens=128, lr=1e30, method="lora", run__warmup_tokens=0, run__schedule="constant"
    )
    with pytest.raises(TrainingDiverged, match=r"step 1: the loss on \S+ is nan; there is no checkpoint yet"):
        train(recipe, tmp_path / "out", corpus)
    assert not (tmp_path / "out" / "lora").exists()
    last = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["step"]) == ("diverged", 1)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(tmp_path, base, corpus, monkeypatch):
    lm_loss, calls = losses.lm_loss, []

    def breaks(logits, labels):
        calls.append(1)
        return lm_loss(logits, labels) * (float("nan") if len(calls) > 6 else 1)

    monkeypatch.setattr(losses, "lm_loss", breaks)
    with pytest.raises(TrainingDiverged, match="step 6"):
        train(write_recipe(tmp_path, base), tmp_path / "out", corpus)
    assert checkpoints.load(checkpoints.latest(tmp_path / "out")).step == 6
    assert all(t.isfinite().all() for t in weights(tmp_path / "out").values())


def test_a_gradient_that_is_not_a_number_stops_before_it_moves_anything(tmp_path, base, corpus, monkeypatch):
    lm_loss, calls = losses.lm_loss, []

    def breaks(logits, labels):
        calls.append(1)
        loss = lm_loss(logits, labels)
        return loss + (0 * logits.sum()).sqrt() if len(calls) > 6 else loss  # + 0, whose slope is not a number

    monkeypatch.setattr(losses, "lm_loss", breaks)
    with pytest.raises(TrainingDiverged, match="step 6: the gradient norm is nan"):
        train(write_recipe(tmp_path, base), tmp_path / "out", corpus)
    assert checkpoints.load(checkpoints.latest(tmp_path / "out")).step == 6
    assert all(t.isfinite().all() for t in weights(tmp_path / "out").values())


def test_a_run_without_room_for_its_adapter_ends_when_there_is(tmp_path, base, corpus, monkeypatch):
    write, out = export.write_adapter, tmp_path / "out"

    def full(*args):
        with no_room():
            write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_adapter", full)
        with pytest.raises(CannotWrite, match=r"cannot write .*hu\.safetensors: .*File too large"):
            train(write_recipe(tmp_path, base, tokens=256), out, corpus)
    assert not [path for path in out.iterdir() if "safetensors" in path.name]
    made = train(write_recipe(tmp_path, base, tokens=256), out, corpus, resume=True)
    assert read_adapter(made).info.results["tokens"] == 256


@pytest.mark.parametrize(("gate", "said"), [("init = 'paper'\ntrained = true\n", True), ("", False)])
def test_keys_that_do_nothing_are_told(tmp_path, base, corpus, capsys, gate, said):
    train(write_recipe(tmp_path, base, tokens=128, gate=gate, gate__min_found=0.0), tmp_path / "out", corpus)
    told = "so these keys do nothing: gate.fit_tokens, gate.min_found, gate.percentile\n"
    assert (told in capsys.readouterr().err) is said


@pytest.mark.parametrize("log", [None, '{"loss": 1.0}\n'])
def test_checkpoints_of_somebody_else_are_left_alone(tmp_path, base, corpus, log):
    theirs = tmp_path / "out" / "checkpoint-500"
    theirs.mkdir(parents=True)
    (theirs / "trainer_state.json").write_text("{}")
    if log is not None:
        (tmp_path / "out" / "log.jsonl").write_text(log)
    before = sorted((tmp_path / "out").rglob("*"))
    for resume in (False, True):
        with pytest.raises(Conflict, match=r"checkpoint-500 is not of a run of nr-serve; name another folder"):
            train(write_recipe(tmp_path, base, tokens=256), tmp_path / "out", corpus, resume=resume)
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_a_run_goes_on_beside_a_checkpoint_half_written_and_clears_it(tmp_path, base, corpus):
    out = tmp_path / "out"
    train(write_recipe(tmp_path, base, tokens=512), out, corpus)
    torn = shutil.copytree(checkpoints.latest(out), out / "checkpoint-9")
    (torn / checkpoints.STATE).unlink()
    assert checkpoints.load(checkpoints.latest(out)).step == 4
    train(write_recipe(tmp_path, base, tokens=512), out, corpus, resume=True)
    assert not torn.exists()
    assert len(list(out.glob("checkpoint-*"))) == checkpoints.KEPT


def test_what_a_user_lays_beside_the_checkpoints_is_left_alone(tmp_path, base, corpus):
    out = tmp_path / "out"
    train(write_recipe(tmp_path, base, tokens=512, run__schedule="constant"), out, corpus)
    mine = [out / name for name in ("checkpoint-best-copy", "checkpoint-10.bak", "checkpoint-2 copy")]
    mine += [out / "checkpoint-99"]  # a file
    for path in mine[:3]:
        shutil.copytree(checkpoints.latest(out), path)
    (mine[0] / checkpoints.STATE).unlink()
    mine[3].write_text("notes")
    train(write_recipe(tmp_path, base, tokens=1024, run__schedule="constant"), out, corpus, resume=True)
    assert all(path.exists() for path in mine)
    own = [path.name for path in out.glob("checkpoint-*") if path not in mine]
    assert sorted(own) == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize("schedule", ["constant", "constant-decay"])
def test_a_run_goes_on_with_a_larger_budget_as_if_it_had_had_it(tmp_path, base, corpus, schedule, monkeypatch):
    changes = {"run__schedule": schedule, "run__decay_share": 0.25, "run__checkpoint_every": 256, "lr": 0.03}
    short, long = (write_recipe(tmp_path, base, tokens=tokens, **changes) for tokens in (1024, 2048))
    end = (
        short.run.decay_start
    )  # the checkpoint there holds the rate of a step that the short run takes more slowly
    with killed_before(end // 128, monkeypatch), suppress(KeyboardInterrupt):
        train(short, tmp_path / "cut", corpus)
    assert checkpoints.load(checkpoints.latest(tmp_path / "cut")).step * 128 == end
    resumed = train(long, tmp_path / "cut", corpus, resume=True)
    assert read_adapter(resumed).version == read_adapter(train(long, tmp_path / "whole", corpus)).version


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_is_compiled_if_its_recipe_says_so(tmp_path, base, compiled):
    recipe = write_recipe(tmp_path, base, run__compile=compiled)
    assert trainer.training_arguments(recipe.run, tmp_path, tensorboard=False).torch_compile == compiled


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_float32_is_float32_whether_or_not_runs_are_compiled(tmp_path, base, monkeypatch):
    enable = transformers.training_args.enable_tf32
    enable.cache_clear()
    monkeypatch.setattr(transformers.training_args, "is_torch_tf32_available", lambda: True)
    for compiled in (False, True, False):
        recipe = write_recipe(tmp_path, base, run__compile=compiled, run__dtype="bfloat16")
        trainer.training_arguments(recipe.run, tmp_path, tensorboard=False)
        assert torch.backends.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    enable.cache_clear()


def test_a_launchers_compiler_does_not_override_the_recipe(tmp_path, base, corpus, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it was compiled"))
    train(write_recipe(tmp_path, base, tokens=128), tmp_path / "out", corpus)


def test_layers_are_computed_twice_if_the_recipe_says_so(tmp_path, base, corpus, monkeypatch):
    calls = {}
    for checkpointing in (False, True):
        keys = {"run__gradient_checkpointing": checkpointing}
        recipe = write_recipe(tmp_path, base, method="finetune", tokens=128, **keys)
        calls[checkpointing] = 0
        forward = LlamaMLP.forward

        def counted(ffn, x, checkpointing=checkpointing, forward=forward):
            calls[checkpointing] += torch.is_grad_enabled()
            return forward(ffn, x)

        with monkeypatch.context() as patch:
            patch.setattr(LlamaMLP, "forward", counted)
            train(recipe, tmp_path / str(checkpointing), corpus)
    assert calls[True] == 2 * calls[False] > 0


def test_so_many_windows_are_measured_in_training_as_the_recipe_says(tmp_path, base, corpus):
    recipe = write_recipe(tmp_path, base, run__validate_windows=3)
    assert [len(windows) for windows in read_run_text(recipe, corpus).heldout.values()] == [3] * 4


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launch_that_splits_the_model_is_refused(tmp_path, base, corpus, name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(BadRequest, match=f"launch without {name}"):
        train(write_recipe(tmp_path, base), tmp_path / "out", corpus)


def test_a_run_goes_on_behind_a_line_of_the_log_that_a_kill_cut(tmp_path, base, corpus):
    out = tmp_path / "out"
    train(write_recipe(tmp_path, base, tokens=256), out, corpus)
    path = out / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    train(write_recipe(tmp_path, base, tokens=256), out, corpus, resume=True)
    assert [entry["event"] for entry in log.read(path)][-1] == "end"


def test_no_checkpoint_goes_before_a_newer_one_is_complete(tmp_path, base, corpus, monkeypatch):
    complete, there = checkpoints.complete, []

    def watched(checkpoint):
        there.append(len([f for f in checkpoint.folder.parent.glob("checkpoint-*") if (f / "state.json").exists()]))
        complete(checkpoint)

    monkeypatch.setattr(checkpoints, "complete", watched)
    train(write_recipe(tmp_path, base), tmp_path / "out", corpus)
    assert there == [0, 1, 2, 2, 2]


def test_two_processes_do_not_train_in_one_folder(tmp_path, base, corpus):
    out = tmp_path / "out"
    out.mkdir()
    with checkpoints.alone(out), pytest.raises(Conflict, match="another process"):
        train(write_recipe(tmp_path, base, tokens=256), out, corpus)
    train(write_recipe(tmp_path, base, tokens=256), out, corpus)


def test_a_damaged_checkpoint_is_named(tmp_path, base, corpus):
    out = tmp_path / "out"
    train(write_recipe(tmp_path, base, tokens=256), out, corpus)
    (checkpoints.latest(out) / checkpoints.WEIGHTS).write_bytes(b"torn")
    with pytest.raises(checkpoints.BadCheckpoint, match="checkpoint-2"):
        train(write_recipe(tmp_path, base, tokens=256), out, corpus, resume=True)


@pytest.mark.parametrize("name", ["trained.safetensors", "refitted.safetensors", "optimizer.pt"])
def test_a_changed_bit_in_a_checkpoint_is_refused_where_it_is_read(tmp_path, base, corpus, name):
    recipe, out = write_recipe(tmp_path, base, tokens=256), tmp_path / "out"
    made = read_adapter(train(recipe, out, corpus))
    damaged, exported = checkpoints.latest(out) / name, tmp_path / "x.safetensors"
    flip_a_bit(damaged)
    message = rf"checkpoint-2/{name} of the checkpoint: it is not as it was written"
    message += "; without this file the gates are fitted again" * (name == "refitted.safetensors")
    with pytest.raises(checkpoints.BadCheckpoint, match=message):
        train(recipe, out, corpus, resume=True)
    if name == "optimizer.pt":
        export_run(out, exported)  # does not read it
    else:
        with pytest.raises(checkpoints.BadCheckpoint, match=message):
            export_run(out, exported)
        assert not exported.exists()
    flip_a_bit(damaged)
    assert read_adapter(train(recipe, out, corpus, resume=True)).version == made.version


def test_weights_of_another_shape_are_refused(tmp_path, base, corpus):
    out = tmp_path / "out"
    train(write_recipe(tmp_path, base, tokens=256), out, corpus)
    saved = checkpoints.load(checkpoints.latest(out))
    weights = saved.weights()
    name = "adapter.layers.1.w_in"
    checkpoints.save_weights(saved.folder, weights | {name: weights[name].flatten().view(-1, 4)})
    checkpoints.complete(saved)
    for read in (
        lambda: train(write_recipe(tmp_path, base, tokens=256), out, corpus, resume=True),
        lambda: export_run(out, tmp_path / "x.safetensors"),
    ):
        with pytest.raises(checkpoints.BadCheckpoint, match=r"recipe and base: adapter\.layers\.1\.w_in"):
            read()


@pytest.mark.parametrize(
    "state",
    [None, [], "[" * 100_000, {"step": None}, {"step": "x"}, {"step": -3}, {"results": None}, {"digests": []}],
    ids=str,
)
def test_a_state_that_is_none_is_named(tmp_path, base, corpus, state):
    out = tmp_path / "out"
    train(write_recipe(tmp_path, base, tokens=256), out, corpus)
    path = checkpoints.latest(out) / checkpoints.STATE
    text = state
    if not isinstance(state, str):
        text = json.dumps(json.loads(path.read_text()) | state if isinstance(state, dict) else state)
    path.write_text(text)
    with pytest.raises(checkpoints.BadCheckpoint, match=r"cannot read the checkpoint .*checkpoint-2"):
        export_run(out, tmp_path / "x.safetensors")


def test_learning_rate_follows_the_schedule():
    common = {"tokens": 1000, "window": 10, "batch_tokens": 10, "warmup_tokens": 100, "lr": 1.0}
    common |= {"original_share": 0, "background_share": 0}
    rates = {
        schedule: [learning_rate(Run(**common, schedule=schedule), step) for step in range(100)]
        for schedule in ("constant", "constant-decay", "cosine")
    }
    for rate in rates.values():
        assert rate[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(rates["constant"][10:]) == {1.0}
    assert rates["constant-decay"][75] == 1.0
    assert rates["constant-decay"][87] == pytest.approx(0.52)
    assert rates["constant-decay"][99] == pytest.approx(1 / 25)
    assert rates["cosine"][55] == pytest.approx(0.5)
    assert rates["cosine"][99] == pytest.approx(math.sin(math.pi / 180) ** 2)


@pytest.mark.parametrize("schedule", ["constant-decay", "cosine"])
def test_a_rate_that_is_still_rising_when_it_should_fall_turns_without_a_jump(schedule):
    run = Run(tokens=1200, window=10, batch_tokens=100, warmup_tokens=1100, lr=1.0, schedule=schedule)
    rates = [learning_rate(run, step) for step in range(run.steps)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def test_a_resumed_run_logs_and_saves_as_often_as_its_recipe_says_now(tmp_path, base, corpus, monkeypatch):
    often = {"run__log_every": 1, "run__checkpoint_every": 128}
    out = tmp_path / "out"
    with killed_before(2, monkeypatch), pytest.raises(KeyboardInterrupt):
        train(write_recipe(tmp_path, base, tokens=1280, **often), out, corpus)
    seldom = {"run__log_every": 4, "run__checkpoint_every": 1024}
    train(write_recipe(tmp_path, base, tokens=1280, **seldom), out, corpus, resume=True)
    steps = [entry["step"] for entry in log.read(out / "log.jsonl") if entry["event"] == "step"]
    assert steps == [1, 2, 4, 8, 10], "the last one is logged too"
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-8"]


def test_measuring_takes_no_part_in_the_rate(tmp_path, base, corpus, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: clock.now))
    loss, measure = trainer.RunTrainer.compute_loss, training.measure

    def step_of_a_second(*args, **kwargs):
        output = loss(*args, **kwargs)
        clock.now += 1.0
        return output

    def hour(*args, **kwargs):
        clock.now += 3600.0
        return measure(*args, **kwargs)

    monkeypatch.setattr(trainer.RunTrainer, "compute_loss", step_of_a_second)
    monkeypatch.setattr(training, "measure", hour)
    recipe = write_recipe(tmp_path, base, tokens=1024, run__log_every=3, run__validate_every=256, run__accumulate=1)
    train(recipe, tmp_path / "out", corpus)
    steps = [entry for entry in log.read(tmp_path / "out" / "log.jsonl") if entry["event"] == "step"]
    assert [entry["step"] for entry in steps] == [3, 6, 8]
    assert [entry["tokens_a_second"] for entry in steps] == pytest.approx([128, 128, 128])


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_file_of_the_trainer_is_refused_and_the_run_stays_as_it_was(tmp_path, base, corpus, name):
    recipe, out = write_recipe(tmp_path, base, tokens=512), tmp_path / "out"
    train(recipe, out, corpus)
    shutil.rmtree(checkpoints.latest(out))
    left = checkpoints.latest(out)
    damaged = left / name
    damaged.write_bytes(b"\xff" * damaged.stat().st_size)
    with pytest.raises(checkpoints.BadCheckpoint, match=rf"checkpoint-2/{name} .*: it is not as it was written"):
        train(recipe, out, corpus, resume=True)
    assert checkpoints.latest(out) == left


def test_results_that_are_none_are_refused(tmp_path, base, corpus):
    recipe, out = write_recipe(tmp_path, base, tokens=512), tmp_path / "out"
    train(recipe, out, corpus)
    path = checkpoints.latest(out) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"results": {"hu.a": 3}}))
    with pytest.raises(checkpoints.BadCheckpoint, match=r"results\.hu\.a"):
        train(recipe, out, corpus, resume=True)


def test_a_run_read_while_its_gates_are_fitted_again_is_read_without_them(tmp_path, base, corpus):
    recipe, out = write_recipe(tmp_path, base, tokens=256), tmp_path / "out"
    train(recipe, out, corpus)
    folder = checkpoints.latest(out)
    refitted = (folder / checkpoints.REFITTED).rename(tmp_path / "kept")
    state = json.loads((folder / checkpoints.STATE).read_text())
    del state["digests"][checkpoints.REFITTED]
    (folder / checkpoints.STATE).write_text(json.dumps(state))
    reading = checkpoints.load(folder)
    refitted.rename(folder / checkpoints.REFITTED)
    assert reading.final().keys() == reading.weights().keys()
    assert not reading.is_refitted
