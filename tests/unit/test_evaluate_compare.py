"""Training runs compared: losses, shares and scores equal those reckoned from the runs' own files."""

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from nr_serve.cli import main
from nr_serve.errors import BadRequest, Conflict
from nr_serve.evaluate import readings
from nr_serve.evaluate.card import card
from nr_serve.evaluate.compare import compare_runs, write_comparison
from nr_serve.evaluate.comparison_report import Comparison, page, run_rows, source_rows
from nr_serve.evaluate.difference import error_of_mean
from nr_serve.evaluate.heldout import Report
from nr_serve.evaluate.pareto import Point
from nr_serve.evaluate.tasks import read_tasks
from nr_serve.neutral.format import Adapter, Block, read_adapter
from nr_serve.train.log import training_seconds
from nr_serve.train.measure import measure
from nr_serve.train.run import train
from nr_serve.train.text import read_heldout
from tests import tiny
from tests.tiny_run import write_recipe

SOURCES = ["hu.*.heldout.txt", "en.*.heldout.txt", "da.*.heldout.txt"]
WINDOWS = 2
ROWS = [{"context": c, "choices": ["ő ű", "the"], "gold": i % 2} for i, c in enumerate(("áé", "of", "űű", "é h"))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, corpus) -> dict[str, Path]:
    """A run of three methods; none reads en.b, and without original windows finetuning forgets."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    shared = {"data__original": ["en.a.train.txt"], "run__original_share": 0.0}
    for method, lr in {"finetune": 0.02, "adapter": 0.03, "neutral": 0.03}.items():
        recipe = write_recipe(folder, base, tokens=1280, lr=lr, method=method, **shared)
        train(recipe, folder / method, corpus)
        made[method] = folder / method
    return made


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "pick.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(runs, corpus, tasks) -> Comparison:
    return compare_runs(runs, corpus, SOURCES, windows=WINDOWS, tasks=read_tasks([tasks]))


def logits_by_run(runs: dict[str, Path], base: Path) -> dict:
    """Run -> the logits of a text, by the files that the run left: none of the code that trains or measures."""
    loop = tiny.Naive(AutoModelForCausalLM.from_pretrained(base))
    tuned = tiny.Naive(AutoModelForCausalLM.from_pretrained(runs["finetune"] / "finetune"))
    files = {name: in_float32(read_adapter(runs[name] / "hu.safetensors")) for name in ("adapter", "neutral")}
    return {
        "base": loop.logits,
        "finetune": tuned.logits,
        **{name: lambda ids, file=file: loop.logits(ids, [file]) for name, file in files.items()},
    }


def in_float32(file: Adapter) -> Adapter:
    blocks = [Block(*(tensor.float() for tensor in vars(block).values())) for block in file.blocks]
    return replace(file, blocks=tuple(blocks))


def test_losses_and_shares_equal_those_reckoned_from_the_runs_files(made, runs, base, corpus):
    texts = read_heldout(corpus, SOURCES, tiny.tokenizer().hf, 256, WINDOWS)
    found = {
        name: {source: tiny.naive_loss(logits, text) for source, text in texts.items()}
        for name, logits in logits_by_run(runs, base).items()
    }
    # An adapter's file holds bfloat16, a run float32.
    assert made.base_losses == pytest.approx(found.pop("base"), rel=1e-5)
    for name, losses in found.items():
        assert made.runs[name].losses == pytest.approx(losses, rel=1e-5 if name == "finetune" else 3e-3)
        assert made.runs[name].target == made.runs[name].losses["hu.a"]
        assert made.runs[name].original == made.runs[name].losses["en.b"]
    before, tuned = made.base_losses, found["finetune"]
    assert tuned["hu.a"] < before["hu.a"]
    assert tuned["en.b"] > before["en.b"]
    for name, losses in found.items():
        learned = (before["hu.a"] - losses["hu.a"]) / (before["hu.a"] - tuned["hu.a"])
        forgotten = (losses["en.b"] - before["en.b"]) / (tuned["en.b"] - before["en.b"])
        assert made.learned(name) == pytest.approx(learned, abs=0.03)
        assert made.forgotten(name) == pytest.approx(forgotten, abs=0.03)
    assert made.learned("finetune") == made.forgotten("finetune") == 1


def test_the_errors_of_the_means_are_those_of_the_change_of_each_window(made, runs, base, corpus):
    texts = read_heldout(corpus, SOURCES, tiny.tokenizer().hf, 256, WINDOWS)
    logits = logits_by_run(runs, base)
    for source, error in (
        ("hu.a", made.runs["finetune"].target_error),
        ("en.b", made.runs["finetune"].original_error),
    ):
        windows = [texts[source].take(slice(i, i + 1)) for i in range(len(texts[source]))]
        changes = [
            (tiny.naive_loss(logits["finetune"], window) - tiny.naive_loss(logits["base"], window))
            * window.labelled
            for window in windows
        ]
        without = [
            (sum(changes) - change) / (texts[source].labelled - window.labelled)
            for change, window in zip(changes, windows, strict=True)
        ]
        jackknife = statistics.stdev(without) * (len(without) - 1) / len(without) ** 0.5
        assert error == pytest.approx(jackknife, rel=0.05)


def test_the_error_of_a_mean_needs_those_of_all():
    assert error_of_mean([0.3, 0.4]) == pytest.approx(0.25)
    assert error_of_mean([0.3, None]) is None


def test_the_unread_text_of_the_bases_language_is_told_by_the_recipes(made, runs, corpus):
    assert (made.target_sources, made.original_sources) == (("hu.a",), ("en.b",))
    assert run_rows(made)[0][6:8] == ["TARGET", "EN UNREAD"]
    assert [row[:2] for row in source_rows(made)[1:]] == [
        ["hu.a", "target"],
        ["en.b", "en unread"],
        ["da.a", "-"],
        ["en.a", "-"],
    ]
    with pytest.raises(BadRequest, match="no source of the base's own language, unread by every run"):
        compare_runs(runs, corpus, ["hu.*.heldout.txt", "en.a.heldout.txt"])


def test_text_that_a_run_has_in_its_background_is_read(tmp_path, base, corpus):
    changes = {"data__original": ["da.a.train.txt"], "data__background": ["en.a.train.txt"]}
    train(write_recipe(tmp_path, base, tokens=256, **changes), tmp_path / "run", corpus)
    more = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    shutil.copy(more / "da.a.heldout.txt", more / "da.z.heldout.txt")
    made = compare_runs({"run": tmp_path / "run"}, more, ["*.heldout.txt"], windows=1)
    assert made.original_sources == ("da.z",)
    assert made.unread == "da unread"


def test_without_sources_the_text_that_the_recipes_hold_out_is_read(tmp_path, base, corpus):
    heldout = ["hu.a.heldout.txt", "en.b.heldout.txt"]
    changes = {"data__original": ["en.a.train.txt"], "data__heldout": heldout}
    train(write_recipe(tmp_path, base, tokens=256, **changes), tmp_path / "run", corpus)
    made = compare_runs({"run": tmp_path / "run"}, corpus, windows=1)
    assert set(made.base_losses) == {"hu.a", "en.b"}


def test_text_is_read_by_the_field_of_the_recipes(tmp_path, base, corpus):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for path in corpus.glob("*.txt"):
        rows = [json.dumps({"text": "", "body": document}) for document in path.read_text().split("\n\n")]
        (folder / path.with_suffix(".jsonl").name).write_text("\n".join(rows))
    changes = {"data__text_field": "body", "data__heldout": ["hu.a.heldout.jsonl", "en.b.heldout.jsonl"]}
    for part, language in {"target": "hu", "original": "en", "background": "da"}.items():
        changes[f"data__{part}"] = [f"{language}.a.train.jsonl"]
    train(write_recipe(tmp_path, base, tokens=256, **changes), tmp_path / "run", folder)
    plain = compare_runs({"run": tmp_path / "run"}, corpus, ["hu.a.heldout.txt", "en.b.heldout.txt"], windows=1)
    assert compare_runs({"run": tmp_path / "run"}, folder, windows=1).base_losses == plain.base_losses
    train(write_recipe(tmp_path, base, tokens=256), tmp_path / "other", corpus)
    with pytest.raises(BadRequest, match="from different fields: body, text"):
        compare_runs({name: tmp_path / name for name in ("run", "other")}, folder)


def test_text_that_a_run_was_trained_on_is_told(runs, corpus, capsys):
    compare_runs(runs, corpus, ["hu.a.train.txt", "da.a.train.txt", "en.b.*"], windows=1)
    warning = "evaluate: warning: not held out, but trained on: da.a.train.txt, hu.a.train.txt\n"
    assert warning in capsys.readouterr().err, "no run was trained on en.b.train.txt"
    compare_runs(runs, corpus, SOURCES, windows=1)
    assert "warning" not in capsys.readouterr().err


def test_what_a_run_cost_is_told(made, runs, base):
    neutral, tuned = made.runs["neutral"], made.runs["finetune"]
    file = read_adapter(runs["neutral"] / "hu.safetensors")
    assert neutral.parameters == sum(b.w_in.numel() + b.w_gate.numel() + b.w_out.numel() for b in file.blocks)
    assert tuned.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert neutral.tokens == 1280
    assert (neutral.lr, tuned.lr) == (0.03, 0.02)
    steps = [json.loads(line) for line in (runs["neutral"] / "log.jsonl").read_text().splitlines()]
    assert neutral.seconds == pytest.approx(
        sum(128 / step["tokens_a_second"] for step in steps if step["event"] == "step")
    )
    assert set(neutral.fired) == set(made.base_losses)
    assert all(0.97 < share < 1 for share in made.runs["adapter"].fired.values()), "all but texts' first tokens"


def test_steps_that_a_resumed_run_repeats_count_once(tmp_path):
    entries = [(100, 50.0), (200, 100.0), (100, 10.0), (200, 10.0), (300, 25.0)]
    lines = [{"event": "step", "tokens": t, "lm": 3.0, "tokens_a_second": rate} for t, rate in entries]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in [{"event": "gates"}, *lines]))
    assert training_seconds(log, 300) == pytest.approx(100 / 50 + 100 / 100 + 100 / 25)
    assert training_seconds(log, 250) == pytest.approx(100 / 50 + 100 / 100 + 50 / 25)
    log.write_text('{"event": "step", "tokens": 100}\n')
    with pytest.raises(BadRequest, match=r"log\.jsonl line 1"):
        training_seconds(log, 300)


def test_tasks_are_scored_by_run_with_the_paired_error_of_the_change(made, runs, base):
    tokenizer = tiny.tokenizer().hf

    def right(logits, row) -> float:
        likelihoods = []
        for choice in row["choices"]:
            ids = tokenizer(f"{row['context']} {choice}")["input_ids"]
            first = len(tokenizer(row["context"])["input_ids"])
            logprobs = logits(ids).log_softmax(-1)
            likelihoods.append(sum(float(logprobs[t - 1, ids[t]]) for t in range(first, len(ids))))
        return float(likelihoods.index(max(likelihoods)) == row["gold"])

    found = logits_by_run(runs, base)
    before = [right(found["base"], row) for row in ROWS]
    after = [right(found["finetune"], row) for row in ROWS]
    scores = made.runs["finetune"].tasks["pick"]
    assert (scores.examples, scores.base.acc.value) == (4, statistics.mean(before))
    assert scores.attached.acc.value == statistics.mean(after)
    changes = [b - a for a, b in zip(before, after, strict=True)]
    assert scores.change.acc.standard_error == pytest.approx(statistics.stdev(changes) / 2)


def test_without_finetuning_there_are_no_shares_and_none_for_the_base(made):
    few = replace(made, runs={"neutral": made.runs["neutral"]})
    assert few.learned("neutral") is None
    assert few.forgotten("neutral") is None
    assert [row[-2:] for row in run_rows(few)[1:]] == [["-", "-"], ["-", "-"]]
    neutral, shares = made.runs["neutral"], "the base's loss"
    point = Point("neutral", neutral.original / made.base_original - 1, 1 - neutral.target / made.base_target)
    assert few.points() == ([point], shares)
    assert made.points()[1] == "finetuning's"
    assert made.points()[0][0] == Point("finetune", 1, 1)


def test_the_finetuning_that_learned_most_is_what_others_are_shares_of(made):
    better = replace(made.runs["finetune"], target=made.base_target - 9, original=made.base_original + 1)
    both = replace(made, runs={**made.runs, "finetune-2": better})
    assert both.learned("neutral") == pytest.approx((made.base_target - made.runs["neutral"].target) / 9)
    assert both.forgotten("neutral") == pytest.approx(made.runs["neutral"].original - made.base_original)
    unharmed = replace(better, original=made.base_original)
    assert replace(made, runs={**made.runs, "finetune-2": unharmed}).forgotten("neutral") is None


def test_the_files_hold_what_was_measured(made, runs, tmp_path):
    written = write_comparison(made, runs, tmp_path / "out")
    assert [path.name for path in written] == ["comparison.json", "comparison.md", "pareto.svg", "loss.svg"]
    read = json.loads(written[0].read_text())
    assert read["shares"]["neutral"] == {"learned": made.learned("neutral"), "forgotten": made.forgotten("neutral")}
    assert read["runs"]["neutral"]["losses"] == made.runs["neutral"].losses
    assert read["runs"]["neutral"]["tasks"]["pick"]["examples"] == 4
    shown = written[1].read_text()
    assert shown == page(made)
    assert "En unread: the mean over en.b, which no run read." in shown
    assert f"| neutral | neutral | 0.03 | 1,280 | {made.runs['neutral'].parameters:,} |" in shown
    assert f"| {made.learned('neutral'):.1%} | {made.forgotten('neutral'):.1%} |" in shown
    assert "| pick | 4 | acc |" in shown
    assert all(path.stat().st_size for path in written)


def test_the_same_comparison_again_measures_nothing(made, runs, corpus, monkeypatch):
    measured = []
    monkeypatch.setattr(readings, "measure", lambda *args: measured.append(args[2]) or measure(*args))
    again = compare_runs(runs, corpus, SOURCES, windows=WINDOWS)
    assert {name: run.losses for name, run in again.runs.items()} == {n: r.losses for n, r in made.runs.items()}
    assert measured == []


def test_the_command_prints_the_tables_and_writes_the_files(runs, corpus, tasks, tmp_path, capsys):
    asked = ["compare", *map(str, runs.values()), "--corpus", str(corpus), "--windows", str(WINDOWS)]
    asked += [flag for source in SOURCES for flag in ("--source", source)]
    assert main([*asked, "--tasks", str(tasks), "--out", str(tmp_path / "out")]) == 0
    seen = capsys.readouterr()
    assert [line.split()[0] for line in seen.out.splitlines() if line] == [
        *("RUN", "base", "finetune", "adapter", "neutral"),
        *("SOURCE", "hu.a", "en.b", "da.a", "en.a"),
        *("TASK", "pick", "pick"),
    ]
    assert "evaluate: text 4 of 4: hu.a; run neutral" in seen.err
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert main([*asked, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["runs"]) == set(runs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "3"], "--limit does nothing without --tasks"),
        (["--out", "taken"], "cannot write in taken"),
        (["--tasks", "absent.jsonl"], "cannot read absent.jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(
    runs, corpus, tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("")
    assert main(["compare", str(runs["neutral"]), "--corpus", str(corpus), *flags]) == 1
    seen = capsys.readouterr().err
    assert message in seen
    assert "text 1 of" not in seen


def test_runs_that_do_not_belong_together_are_refused(runs, corpus, tmp_path, base, capsys):
    assert main(["compare", str(runs["neutral"]), str(runs["neutral"]), "--corpus", str(corpus)]) == 1
    assert "two runs have the same name" in capsys.readouterr().err
    other = write_recipe(tmp_path, base, tokens=128, domain="da", data__target=["da.*.train.txt"],
                         data__background=["hu.*.train.txt"])  # fmt: skip
    train(other, tmp_path / "da", corpus)
    with pytest.raises(BadRequest, match="not all of one base and one domain"):
        compare_runs({**runs, "da": tmp_path / "da"}, corpus, SOURCES)
    with pytest.raises(Conflict, match="holds no checkpoint"):
        compare_runs({"none": tmp_path}, corpus, SOURCES)


def test_a_plain_adapters_card_does_not_tell_of_gates(runs):
    report = Report("b", "f", {"hu": "1"}, 16, {})
    plain = card("hu", read_adapter(runs["adapter"] / "hu.safetensors"), report)
    assert "| gate | none: the blocks act on every token |" in plain
    assert not any(word in plain for word in ("logistic", "relu", "carry", "background"))
    neutral = card("hu", read_adapter(runs["neutral"] / "hu.safetensors"), report)
    assert "| gates | logistic, frozen |" in neutral
    made = read_adapter(runs["neutral"] / "hu.safetensors")
    results = {**made.info.results, "calibrated": {"beside": {"da": "1a2b", "sk": "3c4d"}}}
    beside = card("hu", replace(made, info=replace(made.info, results=results)), report)
    assert "| gates | logistic, frozen, beside `da` `1a2b`, beside `sk` `3c4d` |" in beside
    assert "| background text | `da.*.train.txt` |" in neutral
