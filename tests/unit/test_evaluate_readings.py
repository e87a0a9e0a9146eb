"""Readings: made once, kept under all that decides them, and left out where they must equal another."""

from dataclasses import replace

import pytest
import torch

from nr_serve.errors import UnsupportedBase
from nr_serve.evaluate import readings, tasks
from nr_serve.evaluate.heldout import attach_all
from nr_serve.evaluate.hosted import Hosted
from nr_serve.evaluate.interference import interference
from nr_serve.evaluate.tasks import Example, score_tasks
from nr_serve.neutral.format import Adapter
from nr_serve.train.frozen_base import FrozenBase
from nr_serve.train.measure import measure
from nr_serve.train.text.pack import Windows
from tests import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def measured(monkeypatch) -> list[tuple[str, ...]]:
    """The carries of what was attached, at each measurement that was really made."""
    made = []

    def counted(model, attached, texts):
        made.append(tuple(adapter.carry for adapter in attached.adapters))
        return measure(model, attached, texts)

    monkeypatch.setattr(readings, "measure", counted)
    return made


def windows(seed: int) -> Windows:
    ids_NT = torch.randint(0, tiny.VOCAB, (3, 16), generator=torch.Generator().manual_seed(seed))
    return Windows(ids_NT, torch.arange(16).expand(3, 16) % 9)


def adapter(seed: int, carry: float, target: str, **how) -> Adapter:
    """A random adapter, told by its carry, that learned that text."""
    made = tiny.adapter(tiny.model(), seed, carry=carry, **how)
    recipe = {"data": {"target": [target], "original": ["en.*"]}}
    return replace(made, info=replace(made.info, recipe=recipe), version=f"{seed}-{carry}")


def hosted(contents: str = "f", **adapters: Adapter) -> Hosted:
    return Hosted(FrozenBase("tiny", tiny.model(), tiny.tokenizer().hf, "f00d", contents), adapters)


HU, DA = adapter(1, 0.25, "hu.*", bare_layers=(1,)), adapter(2, 0.5, "da.*")
TEXTS = {"hu.a": windows(1), "en.a": windows(2)}


def test_a_base_that_gives_no_numbers_is_refused_by_the_text_or_the_task():
    broken = hosted("nan", hu=HU)
    with torch.no_grad():
        broken.base.model.lm_head.weight[7] = torch.nan
    with pytest.raises(UnsupportedBase, match=r"the base alone has a loss of nan on text 1 of 2: hu\.a"):
        attach_all(broken, TEXTS)
    task = [Example(context="a", choices=["b", "c"], gold=0)]
    with pytest.raises(UnsupportedBase, match="the base alone has a likelihood of nan on task t"):
        score_tasks(broken, {"t": task})


def test_a_kept_reading_is_the_one_that_was_made(measured, capsys):
    first = attach_all(hosted(hu=HU, da=DA), TEXTS)
    assert measured == [(), (0.25, 0.5)] * 2
    assert capsys.readouterr().err.splitlines() == [
        f"evaluate: text {i} of 2: {source}; attached: {names}"
        for i, source in ((1, "hu.a"), (2, "en.a"))
        for names in ("none", "hu, da")
    ]
    assert attach_all(hosted(hu=HU, da=DA), TEXTS) == first
    assert len(measured) == 4
    assert capsys.readouterr().err.splitlines()[-1] == (
        "evaluate: text 2 of 2: en.a; attached: hu, da (measured before)"
    )


def test_the_base_is_measured_once_for_all_adapters(measured):
    attach_all(hosted(hu=HU), TEXTS)
    attach_all(hosted(da=DA), TEXTS)
    assert measured.count(()) == 2  # a text each


def test_what_decides_a_reading_makes_it_anew(measured):
    one = {"hu.a": TEXTS["hu.a"]}
    attach_all(hosted(hu=HU), one)
    for changed, texts, made in (
        (hosted(hu=adapter(1, 0.75, "hu.*")), one, [(0.75,)]),
        (hosted("g", hu=HU), one, [(), (0.25,)]),
        (hosted(hu=HU), {"hu.a": replace(one["hu.a"], offset_NT=torch.arange(16).expand(3, 16))}, [(), (0.25,)]),
        (hosted(hu=HU, da=DA), one, [(0.25, 0.5)]),
    ):
        measured.clear()
        attach_all(changed, texts)
        assert measured == made


@pytest.mark.parametrize("package", [readings.torch, readings.transformers, readings], ids=lambda p: p.__name__)
def test_another_version_of_a_package_measures_anew(measured, monkeypatch, package):
    one = {"hu.a": TEXTS["hu.a"]}
    attach_all(hosted(hu=HU), one)
    monkeypatch.setattr(package, "__version__", "0.0.1")
    attach_all(hosted(hu=HU), one)
    assert measured == [(), (0.25,)] * 2


def test_an_adapter_alone_is_not_measured_where_no_other_fired(measured):
    shut = adapter(3, 0.5, "da.*", threshold=1e6)
    together = interference(hosted(hu=HU, da=shut), TEXTS)
    assert measured == [(), (0.25, 0.5)] * 2
    assert measure_alone(HU, "hu.a") == together.alone["hu.a"].loss
    measured.clear()
    open_ = interference(hosted(hu=HU, da=DA), TEXTS)
    assert (0.25,) in measured
    assert measure_alone(HU, "hu.a") == open_.alone["hu.a"].loss


def measure_alone(one: Adapter, source: str) -> float:
    beside = hosted(x=one)
    beside.attach(("x",))
    return measure(beside.base.model, beside.attached, {source: TEXTS[source]})[source].loss


def test_answers_to_tasks_are_kept_too(capsys, monkeypatch):
    examples = [Example(context=c, choices=["x", "yy", "z"][: 2 + i], gold=i) for i, c in enumerate(("ab", "cde"))]
    first = score_tasks(hosted(hu=HU), {"t": examples})
    capsys.readouterr()
    assert score_tasks(hosted(hu=HU), {"t": examples}) == first
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate")] == [
        f"evaluate: task 1 of 1: t; attached: {names} (measured before)" for names in ("none", "hu")
    ]
    score_tasks(hosted(hu=HU), {"t": examples[:1]})
    assert "(measured before)" not in capsys.readouterr().err
    other = hosted(hu=HU)
    other.base.tokenizer.chat_template = "{{ messages }}"
    score_tasks(other, {"t": examples})
    assert "(measured before)" not in capsys.readouterr().err
    monkeypatch.setattr(tasks, "version", {"lm_eval": "0.0.1"}.__getitem__)
    score_tasks(hosted(hu=HU), {"t": examples})
    assert "(measured before)" not in capsys.readouterr().err


def test_a_reading_of_nothing_attached_and_of_a_layer_without_a_block_survives(tmp_path):
    report = attach_all(hosted(hu=HU), TEXTS)
    again = attach_all(hosted(hu=HU), TEXTS).document()
    assert again == report.document()
    assert again["sources"]["hu.a"]["fired_by_layer"]["hu"][1] is None
