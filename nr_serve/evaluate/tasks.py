"""Multiple-choice tasks from local files, scored by lm-evaluation-harness on the hosted base.

A task is a JSONL file with one question per line; `gold` is the index of the right choice, from 0:

    {"context": "Question: What is the capital of France?\\nAnswer:", "choices": ["Lyon", "Paris"], "gold": 1}

A task has its file's name. The model reads the context, a space and a choice; its answer is the choice with the
highest log-likelihood (`acc`), or with the highest log-likelihood per character (`acc_norm`).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from nr_serve.disk import refused
from nr_serve.errors import BadRequest, UnsupportedBase, faults
from nr_serve.evaluate.difference import mean_and_error, percent
from nr_serve.evaluate.hosted import Hosted, Subject
from nr_serve.evaluate.readings import once
from nr_serve.train.attach import Attached
from nr_serve.train.text.token_cache import tokenizer_key

BATCH_ROWS = 8


class Example(BaseModel):
    """One question."""

    model_config = ConfigDict(frozen=True, strict=True)

    context: str
    choices: list[Annotated[str, Field(min_length=1)]] = Field(min_length=2)
    gold: int = Field(ge=0)

    @model_validator(mode="after")
    def _gold_is_a_choice(self) -> Example:
        if self.gold >= len(self.choices):
            raise ValueError(f"gold is {self.gold}, but there are {len(self.choices)} choices")
        return self


@dataclass(frozen=True)
class Estimate:
    """A mean over examples, with its standard error."""

    value: float
    standard_error: float | None
    """Standard error of the mean; None for a single example."""

    def __str__(self) -> str:
        return percent(self.value, self.standard_error)


@dataclass(frozen=True)
class Score:
    """How well a task was answered."""

    acc: Estimate
    """Share answered correctly by log-likelihood."""
    acc_norm: Estimate
    """Share answered correctly by log-likelihood per character of the choice."""


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task, for the base and with the adapters attached."""

    examples: int
    base: Score
    attached: Score
    change: Score
    """Attached minus base; the standard errors are paired over examples."""


@dataclass(frozen=True)
class Answer:
    """The answer to one example."""

    logprobs: tuple[float, ...]
    """Log-likelihood of each choice."""
    acc: float
    """1 if the answer by log-likelihood is right, else 0."""
    acc_norm: float
    """1 if the answer by log-likelihood per character is right, else 0."""


def read_tasks(paths: Sequence[Path], limit: int | None = None) -> dict[str, list[Example]]:
    """The first `limit` (None: all) examples of each task; a folder stands for its .jsonl files.

    Raises BadRequest, naming the file and line, for what is not a task, and if two tasks have the same name.
    """
    tasks: dict[str, list[Example]] = {}
    for path in task_files(paths):
        if path.stem in tasks:
            raise BadRequest(f"two tasks have the same name: {path.stem}", param="tasks")
        tasks[path.stem] = _read_examples(path)[:limit]
    return tasks


def task_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files of tasks; a folder stands for its .jsonl files. Raises BadRequest for a folder without one."""
    for path in paths:
        with refused(f"cannot read {path}"):
            found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise BadRequest(f"no .jsonl file in {path}", param="tasks")
        yield from found


def score_tasks(hosted: Hosted, tasks: Mapping[str, Sequence[Example]]) -> dict[str, TaskScores]:
    """Score every task with no adapter and with all adapters attached.

    Raises UnsupportedBase if the base alone gives a choice no likelihood.
    """
    base = answer_tasks(hosted.attach(()), tasks)
    for name, answers in base.items():
        if any(math.isnan(logprob) for each in answers for logprob in each.logprobs):
            raise UnsupportedBase(f"the base alone has a likelihood of nan on task {name}")
    attached = answer_tasks(hosted.attach(hosted.names), tasks)
    return {name: score(base[name], attached[name]) for name in tasks}


def answer_tasks(subject: Subject, tasks: Mapping[str, Sequence[Example]]) -> dict[str, list[Answer]]:
    """Answer every example, by task, or take an earlier call's answers."""
    answers = {}
    packages = [version("lm_eval"), tokenizer_key(subject.base.tokenizer)] if tasks else []
    for i, (name, examples) in enumerate(tasks.items(), start=1):
        what = ["task", *packages, [example.model_dump() for example in examples]]
        make = partial(answer, subject, name, examples)
        place = f"task {i} of {len(tasks)}: {name}"
        answers[name] = once(subject, what, make, TypeAdapter(list[Answer]), place)
    return answers


def answer(
    subject: Subject, name: str, examples: Sequence[Example], *, batch_rows: int = BATCH_ROWS
) -> list[Answer]:
    """Answer the examples of one task.

    `batch_rows` choices share a forward pass. A context longer than the base can read is cut on the left, with a
    warning. Raises BadRequest for a choice as long as that, which would leave no room for context, and for an empty
    context where the base's tokenizer has no token to put in its place.
    """
    from lm_eval.api.task import ConfigurableTask  # type: ignore[import-untyped, unused-ignore]
    from lm_eval.evaluator import evaluate  # type: ignore[import-untyped, unused-ignore]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped, unused-ignore]

    base = subject.base
    with _quiet():
        model = HFLM(
            pretrained=base.model,
            tokenizer=copy.deepcopy(base.tokenizer),  # the harness adds a padding token to it
            backend="causal",
            batch_size=batch_rows,
        )
        task = ConfigurableTask(config=_config(name, examples))
    if model.prefix_token_id is None:
        _check_contexts(name, examples)
        model.custom_prefix_token_id = model.tokenizer.pad_token_id  # never read, but the harness decodes it
    _check_choices(name, examples, model.tokenizer, model.max_length)
    hook = base.model.register_forward_pre_hook(_begin(subject.attached), with_kwargs=True)
    try:
        made = {"tasks": {name: task}, "groups": {}}
        results = evaluate(model, made, bootstrap_iters=0, log_samples=True)
    finally:
        hook.remove()
    return [_answer(sample) for sample in results["samples"][name]]


def score(base: Sequence[Answer], attached: Sequence[Answer]) -> TaskScores:
    """The scores of one task from the base's answers, and from the answers with something attached."""

    def estimates(which: str) -> tuple[Estimate, Estimate, Estimate]:
        before = [float(getattr(answer, which)) for answer in base]
        after = [float(getattr(answer, which)) for answer in attached]
        changes = [b - a for a, b in zip(before, after, strict=True)]
        one, two, three = (Estimate(*mean_and_error(values)) for values in (before, after, changes))
        return one, two, three

    pairs = zip(estimates("acc"), estimates("acc_norm"), strict=True)
    of_base, of_attached, of_change = (Score(acc, acc_norm) for acc, acc_norm in pairs)
    return TaskScores(len(base), of_base, of_attached, of_change)


def _read_examples(path: Path) -> list[Example]:
    try:
        # Drops a byte order mark. Not splitlines(), which also splits at characters that a JSON string may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {error.strerror}", param="tasks") from error
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8: {error.reason}", param="tasks") from error
    examples = [_read_example(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not examples:
        raise BadRequest(f"{path} holds no example", param="tasks")
    return examples


def _read_example(path: Path, number: int, line: str) -> Example:
    try:
        return Example.model_validate_json(line)
    except ValidationError as error:
        raise BadRequest(f"{path} line {number}: {faults(error)}", param="tasks") from error


def _check_contexts(name: str, examples: Sequence[Example]) -> None:
    for number, example in enumerate(examples, start=1):
        if not example.context.strip():
            fault = "the context is empty, and the base's tokenizer has no token that begins a text"
            raise BadRequest(f"{name}, example {number}: {fault}", param="tasks")


def _check_choices(name: str, examples: Sequence[Example], tokenizer: Any, most: int) -> None:
    for number, example in enumerate(examples, start=1):
        for choice in example.choices:
            length = len(tokenizer(f" {choice}", add_special_tokens=False)["input_ids"])
            if length >= most:
                fault = f"a choice has {length:,} tokens; the base reads {most:,}"
                raise BadRequest(f"{name}, example {number}: {fault}", param="tasks")


def _config(name: str, examples: Sequence[Example]) -> dict[str, Any]:
    import datasets  # type: ignore[import-untyped, unused-ignore]

    # From memory, not by the harness's `dataset_path`, which would copy each file into a permanent cache.
    rows = datasets.Dataset.from_list([example.model_dump() for example in examples])
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }


def _begin(attached: Attached) -> Any:
    """A hook that restarts the gates' carry in every row of a batch.

    Rows are padded on the right, after every token that is read, so a causal model's answers do not depend on it.
    """

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids_BT = args[0] if args else kwargs["input_ids"]
        attached.begin(torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT))
        return args, kwargs | {"use_cache": False}

    return before


def _answer(sample: Mapping[str, Any]) -> Answer:
    logprobs = tuple(float(logprob) for logprob, _ in sample["filtered_resps"])
    return Answer(logprobs, float(sample["acc"]), float(sample["acc_norm"]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's warnings that model and data set come from memory, which is intended here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
