"""Interference: losses with none, its own and all adapters attached, who fires on what, and what is worst."""

import json
import random
import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch

from nr_serve.errors import BadAdapterFile, BadRequest
from nr_serve.evaluate.card import card
from nr_serve.evaluate.difference import Difference, difference
from nr_serve.evaluate.heldout import Report, SourceReport, attach_all
from nr_serve.evaluate.hosted import Hosted
from nr_serve.evaluate.interference import Alone, Interference, interference
from nr_serve.evaluate.report_plots import gate_rates
from nr_serve.evaluate.roles import Role, assign_roles
from nr_serve.evaluate.tables import interference_page, interference_rows
from nr_serve.neutral import math
from nr_serve.neutral.format import Adapter
from nr_serve.train.frozen_base import FrozenBase
from nr_serve.train.measure import SourceResult
from nr_serve.train.text.pack import Windows
from tests import tiny

BARE = 1
"""The layer of the second adapter that has no block."""


def learned(seed: int, *target: str, background: tuple[str, ...] = (), **how) -> Adapter:
    """A random adapter whose recipe names that text."""
    made = tiny.adapter(tiny.model(), seed, carry=0.5, **how)
    data = {"target": list(target), "original": ["en.*.train.txt"], "background": list(background)}
    info = made.info.__class__(**{**vars(made.info), "domain": target[0].split(".")[0], "recipe": {"data": data}})
    return Adapter(info=info, blocks=made.blocks, version=made.version, nbytes=made.nbytes)


def windows(seed: int, n: int = 3) -> Windows:
    """Random tokens; each window holds a document that ends and one that starts."""
    g = torch.Generator().manual_seed(seed)
    place_NT = torch.arange(16).expand(n, 16)
    cut_N1 = torch.randint(3, 12, (n, 1), generator=g)
    offset_NT = torch.where(place_NT >= cut_N1, place_NT - cut_N1, place_NT)
    return Windows(torch.randint(0, tiny.VOCAB, (n, 16), generator=g), offset_NT)


TEXTS = {name: windows(i) for i, name in enumerate(["hu.a", "da.a", "nb.a", "en.a", "cs.a", "xx.a"])}


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    return {
        "hu": learned(1, "hu.*.train.txt", background=("cs.*.train.txt",)),
        "da": learned(2, "da.a.train.txt", bare_layers=(BARE,)),
    }


@pytest.fixture(scope="module")
def measured(adapters) -> Interference:
    base = FrozenBase("tiny", tiny.model(), tiny.tokenizer().hf, "f", "c")
    return interference(Hosted(base, adapters), TEXTS, {"nb": ["da"]})


class Counting(tiny.Naive):
    """The naive loop, which also counts the tokens on which each adapter fired, by layer."""

    def __init__(self, adapters) -> None:
        super().__init__(tiny.model())
        self.fired = {id(adapter): [0] * tiny.LAYERS for adapter in adapters}

    def _add(self, layer, x, y):
        for each in self._adapters:
            block = each.blocks[layer]
            if block is not None:
                m = math.carry(math.gate_logit(x[0], block.gate, block.bias), each.info.carry)
                self.fired[id(each)][layer] += int((m > each.info.threshold).sum())
        return super()._add(layer, x, y)


def naive(text: Windows, attached) -> tuple[float, dict[int, list[int]]]:
    """Loss of a text, document by document, and tokens fired by adapter and layer."""
    loop = Counting(attached)
    return tiny.naive_loss(partial(loop.logits, adapters=attached), text), loop.fired


def test_every_loss_and_fired_share_equals_the_naive_loops(measured, adapters):
    for source, text in TEXTS.items():
        row = measured.report.sources[source]
        loss, fired = naive(text, list(adapters.values()))
        assert row.before == pytest.approx(naive(text, [])[0], rel=1e-5)
        assert row.after == pytest.approx(loss, rel=1e-5)
        assert row.tokens == text.ids_NT.numel()
        for name, adapter in adapters.items():
            by_layer = [count / row.tokens for count in fired[id(adapter)]]
            present = [share for i, share in enumerate(by_layer) if adapter.blocks[i] is not None]
            assert row.fired[name] == pytest.approx(statistics.mean(present))
            expected = [s if adapter.blocks[i] is not None else None for i, s in enumerate(by_layer)]
            assert list(row.fired_by_layer[name]) == expected
    assert measured.report.sources["hu.a"].fired_by_layer["da"][BARE] is None


def test_a_text_is_also_read_with_its_own_adapter_alone(measured, adapters):
    assert set(measured.alone) == {"hu.a", "da.a"}
    for source, name in {"hu.a": "hu", "da.a": "da"}.items():
        alone, together = measured.alone[source], measured.report.sources[source].after
        assert alone.loss == pytest.approx(naive(TEXTS[source], [adapters[name]])[0], rel=1e-5)
        assert alone.difference.nats == pytest.approx(together - alone.loss, abs=1e-6)
        assert abs(alone.difference.nats) > 1e-3


def test_one_adapter_alone_is_all_attached(adapters):
    base = FrozenBase("tiny", tiny.model(), tiny.tokenizer().hf, "f", "c")
    measured = interference(Hosted(base, {"hu": adapters["hu"]}), {"hu.a": TEXTS["hu.a"]})
    assert measured.alone["hu.a"].loss == measured.report.sources["hu.a"].after
    assert measured.alone["hu.a"].difference == Difference(0.0, 0.0, 0.0, 0.0)


def test_what_is_attached_for_one_measurement_is_not_for_the_next(adapters, tmp_path, monkeypatch):
    hosted = Hosted(FrozenBase("tiny", tiny.model(), tiny.tokenizer().hf, "f", "c"), adapters)
    first = attach_all(hosted, TEXTS)
    monkeypatch.setenv("NR_CACHE", str(tmp_path))  # so that all is measured anew
    assert attach_all(hosted, TEXTS) == first


def test_a_source_has_the_role_that_the_recipes_give_it(adapters):
    bio = learned(3, "en.biomed.train.txt", background=("datasets:wiki/sv@train",))
    sources = [
        "hu.lohelp",
        "da.a",
        "da.b",
        "nb.ui",
        "en.biomed",
        "en.boolq",
        "cs.ui",
        "ca.ui",
        "wiki/sv",
        "/c/wiki/sv",
    ]
    roles = assign_roles(sources, {**adapters, "bio": bio}, {"nb": ["da", "hu"]})
    assert {source: role.kind for source, role in roles.items()} == {
        "hu.lohelp": "own",
        "da.a": "own",
        "da.b": "seen",
        "nb.ui": "near",
        "en.biomed": "own",
        "en.boolq": "original",
        "cs.ui": "seen",
        "ca.ui": "unseen",
        "wiki/sv": "seen",
        "/c/wiki/sv": "seen",
    }
    assert roles["hu.lohelp"].own == ("hu",)
    assert roles["nb.ui"].near == ("hu", "da")
    assert roles["en.biomed"] == Role("own", ("bio",), (), original=True)
    assert roles["en.boolq"].original
    assert not roles["hu.lohelp"].original


def test_an_adapter_without_a_recipe_has_learned_the_language_of_its_domain():
    bare = learned(1, "hu.*")
    info = bare.info.__class__(**{**vars(bare.info), "recipe": {}})
    roles = assign_roles(["hu.a", "en.a"], {"x": Adapter(info, bare.blocks, "v", 0)}, {})
    assert [role.kind for role in roles.values()] == ["own", "original"]
    for part in ("target", "original", "background"):
        info = bare.info.__class__(**{**vars(bare.info), "recipe": {"data": {part: "hu.*"}}})
        with pytest.raises(BadAdapterFile, match="not lists of sources"):
            assign_roles(["hu.a"], {"x": Adapter(info, bare.blocks, "v", 0)}, {})


def test_two_adapters_may_have_learned_one_text_and_are_then_attached_together(adapters):
    both = {**adapters, "hu2": learned(4, "hu.a.train.txt")}
    base = FrozenBase("tiny", tiny.model(), tiny.tokenizer().hf, "f", "c")
    alone = interference(Hosted(base, both), {"hu.a": TEXTS["hu.a"]}).alone["hu.a"]
    assert alone.loss == pytest.approx(naive(TEXTS["hu.a"], [both["hu"], both["hu2"]])[0], rel=1e-5)


def test_a_mark_that_does_not_apply_is_refused(adapters):
    with pytest.raises(BadRequest, match="no adapter here learned sv"):
        assign_roles(["nb.a"], adapters, {"nb": ["sv"]})
    with pytest.raises(BadRequest, match="of the language nb"):
        assign_roles(["hu.a"], adapters, {"nb": ["da"]})


def result(nats: list[float], labels: list[int]) -> SourceResult:
    return SourceResult(sum(nats) / sum(labels), 0, (), (), tuple(nats), tuple(labels))


def test_the_standard_error_of_a_difference_is_paired_over_windows():
    before, after = [30.0, 60.0, 90.0], [33.0, 62.0, 94.0]
    one = difference(result(before, [10, 10, 10]), result(after, [10, 10, 10]))
    a_token = [(b - a) / 10 for a, b in zip(before, after, strict=True)]
    assert one.nats == pytest.approx(statistics.mean(a_token))
    assert one.share == pytest.approx(9 / 180)
    assert one.nats_error == pytest.approx(statistics.stdev(a_token) / 3**0.5)
    single = difference(result([30.0], [10]), result([33.0], [10]))
    assert (single.nats_error, single.standard_error) == (None, None)


def test_the_standard_error_of_unequal_windows_is_the_jackknifes():
    g = random.Random(0)
    labels = [g.randint(150, 255) for _ in range(200)]
    before = [4 * n + g.gauss(0, 60) for n in labels]
    after = [0.6 * b + 0.02 * n + g.gauss(0, 5) for b, n in zip(before, labels, strict=True)]
    found = difference(result(before, labels), result(after, labels))
    d = [a - b for a, b in zip(after, before, strict=True)]
    for error, below in ((found.nats_error, labels), (found.standard_error, before)):
        left_out = [(sum(d) - x) / (sum(below) - n) for x, n in zip(d, below, strict=True)]
        spread = sum((x - statistics.mean(left_out)) ** 2 for x in left_out)
        assert error == pytest.approx(((len(d) - 1) / len(d) * spread) ** 0.5, rel=0.02)
    assert found.standard_error * sum(before) / sum(labels) < 0.5 * found.nats_error


def made_up() -> Interference:
    """Rows whose worst are known."""
    rows = {  # source: role, change of all against base, fired by hu and da
        "hu.a": (Role("own", ("hu",)), -0.40, 0.80, 0.02),
        "da.a": (Role("own", ("da",)), -0.30, 0.01, 0.90),
        "nb.a": (Role("near", near=("da",)), 0.09, 0.05, 0.60),
        "en.a": (Role("original", original=True), 0.01, 0.002, 0.0),
        "en.b": (Role("original", original=True), -0.02, 0.0, 0.003),
        "en.c": (Role("own", ("hu",), original=True), -0.5, 0.9, 0.004),
        "cs.a": (Role("seen"), 0.02, 0.03, 0.0),
        "ca.a": (Role("unseen"), 0.03, 0.0, 0.04),
        "id.a": (Role("unseen"), 0.04, 0.0, 0.0),
    }
    sources = {
        name: SourceReport(
            before=4.0,
            after=4 * (1 + change),
            difference=Difference(4 * change, 0.004, change, 0.001),
            tokens=100,
            fired={"hu": hu, "da": da},
            fired_by_layer={"hu": (hu, hu), "da": (da, None)},
        )
        for name, (_, change, hu, da) in rows.items()
    }
    report = Report("b", "f", {"hu": "1", "da": "2"}, 16, sources)
    alone = {
        "hu.a": Alone(2.4, Difference(0.1, 0.01, 0.04, 0.002)),
        "da.a": Alone(2.8, Difference(-0.1, 0.01, -0.03, 0.002)),
        "en.c": Alone(2.0, Difference(0.0, None, 0.0, None)),
    }
    return Interference(report, {name: role for name, (role, *_) in rows.items()}, alone)


def test_the_summary_names_the_worst_of_every_kind():
    summary = made_up().summary()
    worst = {name: (w.value, w.source, w.adapter) for name, w in vars(summary).items()}
    assert worst == {
        "own_against_alone": (0.04, "hu.a", None),
        "original_against_base": (0.01, "en.a", None),
        "seen_against_base": (0.02, "cs.a", None),
        "unseen_against_base": (0.04, "id.a", None),
        "near_against_base": (0.09, "nb.a", None),
        "original_fired": (0.004, "en.c", "da"),
        "foreign_fired": (0.05, "nb.a", "hu"),  # who learned no relative of it
        "near_fired": (0.60, "nb.a", "da"),
    }
    assert (summary.own_against_alone.standard_error, summary.near_against_base.standard_error) == (0.002, 0.001)


def test_what_is_no_number_is_the_worst():
    made, nan = made_up(), float("nan")
    row = replace(made.report.sources["en.b"], difference=Difference(nan, nan, nan, nan))
    report = replace(made.report, sources={**made.report.sources, "en.b": row})
    worst = replace(made, report=report).summary().original_against_base
    assert (worst.source, worst.value != worst.value) == ("en.b", True)


def test_a_summary_without_rows_of_a_kind_leaves_it_out():
    whole = made_up()
    keep = {"hu.a": whole.roles["hu.a"]}
    report = Report("b", "f", {"hu": "1", "da": "2"}, 16, {"hu.a": whole.report.sources["hu.a"]})
    few = Interference(report, keep, {"hu.a": whole.alone["hu.a"]})
    assert few.summary().unseen_against_base is None
    assert "no recipe" not in interference_page(few)


def test_the_page_and_the_table_put_own_text_first():
    rows = interference_rows(made_up())
    assert [row[0] for row in rows[1:]] == ["en.c", "hu.a", "da.a", "nb.a", "en.a", "en.b", "cs.a", "ca.a", "id.a"]
    assert rows[2][:4] == ["hu.a", "own hu", "100", "4.0000"]
    page = interference_page(made_up(), ["![x](y.svg)"])
    assert (
        "| hu.a | own hu | 100 | 4.0000 | 2.4000 | 2.4000 | -40.00% ± 0.10% | +4.00% ± 0.20% | 80.00% | 2.00% |"
        in page
    )
    assert "| fired on the base's language | 0.40% | da on en.c |" in page
    assert page.endswith("\n\n![x](y.svg)\n")


def test_the_report_is_one_json_document(measured):
    read = json.loads(json.dumps(measured.document()))
    row = read["sources"]["hu.a"]
    assert row["role"]["kind"] == "own"
    assert row["alone"]["difference"]["share"] == measured.alone["hu.a"].difference.share
    assert row["difference"]["standard_error"] > 0
    assert read["sources"]["en.a"]["alone"] is None
    assert read["summary"]["near_fired"]["source"] == "nb.a"


def test_gate_rates_weigh_the_sources_of_a_language_by_their_tokens():
    whole = made_up()
    sources = dict(whole.report.sources)
    sources["en.b"] = SourceReport(
        before=4.0,
        after=4.0,
        difference=Difference(0, None, 0, None),
        tokens=300,
        fired={"hu": 0, "da": 0},
        fired_by_layer={"hu": (0.1, 0.2), "da": (0.0, None)},
    )
    report = Report("b", "f", {"hu": "1", "da": "2"}, 16, sources)
    rates = gate_rates(report, whole.roles, "hu")
    assert list(rates) == ["en (own)", "hu (own)", "ca", "cs", "da", "en", "id", "nb"]
    assert rates["en"] == pytest.approx([(0.002 + 3 * 0.1) / 4, (0.002 + 3 * 0.2) / 4])
    assert gate_rates(report, whole.roles, "da")["nb"] == [0.60, None]


def test_the_card_shows_plots_and_the_error_of_each_change(adapters):
    page = card("hu", adapters["hu"], made_up().report, links=["![gates](plots/gates-hu.svg)"])
    assert "| hu.a | 4.000 | 2.400 | -40.00% ± 0.10% | 80.00% | 100 |" in page
    assert page.endswith("|\n\n![gates](plots/gates-hu.svg)\n")
