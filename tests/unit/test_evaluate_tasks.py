"""Multiple-choice tasks: files that are read or refused, and scores that equal the naive loop's."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from nr_serve.errors import BadRequest
from nr_serve.evaluate import tasks as module
from nr_serve.evaluate.hosted import Hosted
from nr_serve.evaluate.tables import task_rows
from nr_serve.evaluate.tasks import answer, read_tasks, score_tasks
from nr_serve.train.frozen_base import FrozenBase
from tests import tiny

ROWS = [
    {"context": "abc", "choices": ["x", "yyyy", "zz zz zz"], "gold": 1},
    {"context": "A longer context, so that rows are padded.", "choices": ["a", "b"], "gold": 0},
    {"context": "def", "choices": ["no", "yes"], "gold": 1},
    {"context": "Árvíztűrő", "choices": ["tükörfúrógép", "x"], "gold": 0},
    {"context": "7", "choices": ["seven", "eight"], "gold": 1},
]


@pytest.fixture
def hosted() -> Hosted:
    adapters = {"a": tiny.adapter(tiny.model(), 1, carry=0.5), "b": tiny.adapter(tiny.model(), 2, carry=0.8)}
    return Hosted(FrozenBase("tiny", tiny.model(), tiny.tokenizer().hf, "f", "c"), adapters)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def naive(attached, row) -> list[float]:
    """Log-likelihood of each choice, alone in its batch."""
    loop, tokenizer, found = tiny.Naive(tiny.model()), tiny.tokenizer().hf, []
    context = tokenizer(row["context"])["input_ids"]
    for choice in row["choices"]:
        ids = tokenizer(f"{row['context']} {choice}")["input_ids"]
        logprobs = loop.logits(ids, attached).log_softmax(-1)
        scored = range(len(context), len(ids))
        found.append(sum(float(logprobs[t - 1, ids[t]]) for t in scored))
    return found


def answered(hosted, names, examples):
    return answer(hosted.attach(names), "t", examples)


@pytest.mark.parametrize("batch_rows", [1, 3, 16])
def test_scores_equal_the_naive_loop_whatever_the_batch(hosted, tmp_path, batch_rows):
    examples = read_tasks([write(tmp_path / "t.jsonl", ROWS)])["t"]
    for names in ((), ("a", "b")):
        attached = [hosted.adapters[name] for name in names]
        answers = answer(hosted.attach(names), "t", examples, batch_rows=batch_rows)
        for found, row in zip(answers, ROWS, strict=True):
            logprobs = naive(attached, row)
            assert found.logprobs == pytest.approx(logprobs, rel=1e-4)
            a_character = [p / len(choice) for p, choice in zip(logprobs, row["choices"], strict=True)]
            assert found.acc == (logprobs.index(max(logprobs)) == row["gold"])
            assert found.acc_norm == (a_character.index(max(a_character)) == row["gold"])


def test_a_report_has_both_accuracies_and_the_paired_error_of_their_change(hosted, tmp_path):
    tasks = read_tasks([write(tmp_path / "t.jsonl", ROWS), write(tmp_path / "one.jsonl", ROWS[:1])])
    scores = score_tasks(hosted, tasks)
    before, after = ([a.acc for a in answered(hosted, names, tasks["t"])] for names in ((), ("a", "b")))
    changes = [b - a for a, b in zip(before, after, strict=True)]
    found = scores["t"]
    assert found.examples == 5
    assert found.base.acc.value == pytest.approx(statistics.mean(before))
    assert found.base.acc.standard_error == pytest.approx(statistics.stdev(before) / 5**0.5)
    assert found.attached.acc.value == pytest.approx(statistics.mean(after))
    assert found.change.acc.value == pytest.approx(statistics.mean(changes))
    assert found.change.acc.standard_error == pytest.approx(statistics.stdev(changes) / 5**0.5)
    assert scores["one"].base.acc.standard_error is None
    assert [row[:3] for row in task_rows(scores)[1:3]] == [["t", "5", "acc"], ["t", "5", "acc_norm"]]


def test_scoring_leaves_the_base_and_its_tokenizer_as_they_were(hosted, tmp_path):
    tasks = read_tasks([write(tmp_path / "t.jsonl", ROWS)])
    before = hosted.base.tokenizer.pad_token
    answered(hosted, ("a",), tasks["t"])
    assert hosted.base.tokenizer.pad_token == before
    assert not hosted.base.model._forward_pre_hooks
    offset = torch.arange(4)[None]
    hosted.attached.begin(offset)  # a hook left behind would refuse what measures held-out text
    hosted.base.model(torch.zeros_like(offset), use_cache=False)


def test_a_choice_that_fills_the_context_is_named(hosted, tmp_path):
    long = {"context": "a", "choices": ["b", "x" * 5000], "gold": 0}
    examples = read_tasks([write(tmp_path / "t.jsonl", [ROWS[0], long])])["t"]
    with pytest.raises(BadRequest, match=r"t, example 2: a choice has 5,001 tokens; the base reads \d+"):
        answered(hosted, (), examples)


def test_without_a_token_that_begins_a_text_only_empty_contexts_are_refused(hosted, tmp_path):
    examples = read_tasks([write(tmp_path / "t.jsonl", [*ROWS, ROWS[0] | {"context": ""}])])["t"]
    expected = answered(hosted, ("a",), examples[:-1])
    hosted.base.tokenizer.eos_token = None
    assert hosted.base.tokenizer.bos_token is None
    assert answered(hosted, ("a",), examples[:-1]) == expected
    with pytest.raises(BadRequest, match="t, example 6: the context is empty, and the base's tokenizer has no"):
        answered(hosted, (), examples)


def test_a_folder_stands_for_its_files_and_a_limit_for_their_first_examples(tmp_path):
    write(tmp_path / "b.jsonl", ROWS)
    write(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "notes.txt").write_text("not a task")
    tasks = read_tasks([tmp_path], limit=2)
    assert {name: len(examples) for name, examples in tasks.items()} == {"a": 1, "b": 2}
    assert [example.context for example in tasks["b"]] == [row["context"] for row in ROWS[:2]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Invalid JSON"),
        ("[]", "valid dictionary|object"),
        ('{"context": "a", "choices": ["b", "c"]}', "gold: Field required"),
        ('{"context": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2, but there are 2 choices"),
        ('{"context": "a", "choices": ["b", "c"], "gold": -1}', "gold: "),
        ('{"context": "a", "choices": ["b", "c"], "gold": true}', "gold: "),
        ('{"context": "a", "choices": ["b"], "gold": 0}', "choices: "),
        ('{"context": "a", "choices": ["b", ""], "gold": 0}', r"choices\.1: "),
        ('{"context": 1, "choices": ["b", "c"], "gold": 0}', "context: "),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(BadRequest, match=rf"t\.jsonl line 3: .*({message})"):
        read_tasks([path], limit=1)


def test_the_documented_example_is_a_task(tmp_path):
    (line,) = (line for line in (module.__doc__ or "").splitlines() if line.startswith("    {"))
    (tmp_path / "capitals.jsonl").write_text(line.strip() + "\n")
    (example,) = read_tasks([tmp_path])["capitals"]
    assert example.choices[example.gold] == "Paris"
    assert example.context.endswith("?\nAnswer:")


def test_a_line_may_hold_any_character_that_json_may(tmp_path):
    path = tmp_path / "t.jsonl"
    row = ROWS[0] | {"context": "one\u2028two\x85three"}
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(json.dumps(row, ensure_ascii=False), encoding=encoding)
        assert read_tasks([path])["t"][0].context == row["context"]


def test_what_is_not_a_task_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="cannot read"):
        read_tasks([tmp_path / "absent.jsonl"])
    with pytest.raises(BadRequest, match=r"no \.jsonl file"):
        read_tasks([tmp_path])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadRequest, match="holds no example"):
        read_tasks([tmp_path])
    (tmp_path / "empty.jsonl").write_bytes(b"\xff")
    with pytest.raises(BadRequest, match="not UTF-8"):
        read_tasks([tmp_path])
    (tmp_path / "x").mkdir()
    path = write(tmp_path / "t.jsonl", ROWS)
    with pytest.raises(BadRequest, match="same name: t"):
        read_tasks([path, write(tmp_path / "x" / "t.jsonl", ROWS)])
