"""Language switches: rates and losses equal the naive loop's, and the tokens to open and shut are counted right."""

import json
from dataclasses import replace

import pytest
import torch

from nr_serve.errors import BadRequest
from nr_serve.evaluate import switches as module
from nr_serve.evaluate.hosted import Hosted
from nr_serve.evaluate.report_plots import plot_switches
from nr_serve.evaluate.switches import Steady, SwitchReport, SwitchText, steady_rates, switch_texts, switches
from nr_serve.evaluate.tables import switch_rows
from nr_serve.neutral import math
from nr_serve.neutral.format import Adapter
from nr_serve.train.frozen_base import FrozenBase
from nr_serve.train.text.pack import Windows
from tests import tiny

S = 12


def learned(seed: int, target: str, **how) -> Adapter:
    made = tiny.adapter(tiny.model(), seed, **how)
    recipe = {"data": {"target": [f"{target}.*.train.txt"], "original": ["en.a.train.txt"]}}
    return replace(made, info=replace(made.info, domain=target, recipe=recipe))


def hosted(**adapters: Adapter) -> Hosted:
    return Hosted(FrozenBase("tiny", tiny.model(), tiny.tokenizer().hf, "f", "c"), adapters)


class Counting(tiny.Naive):
    """The naive loop, which also counts the layers that fired at each token."""

    def _add(self, layer, x, y):
        for each in self._adapters:
            block = each.blocks[layer]
            if block is not None:
                z = math.gate_logit(x[0], block.gate, block.bias)
                self.fired_T += math.carry(z, each.info.carry) > each.info.threshold
        return super()._add(layer, x, y)

    def read(self, ids, adapters):
        self.fired_T = torch.zeros(len(ids))
        return self.logits(ids, adapters)


def test_rates_and_losses_are_the_naive_loops_with_the_carry_running_through():
    adapters = {
        "hu": learned(1, "hu", carry=0.8, threshold=0.1, bare_layers=(1,)),
        "da": learned(2, "da", carry=0.5),
    }
    g = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(0, tiny.VOCAB, (11, 3 * S), generator=g)
    measured = switches(hosted(**adapters), {name: SwitchText(ids_NT, ("en.b",), ("x",)) for name in adapters})
    loop = Counting(tiny.model())
    for name, adapter in adapters.items():
        fired_T, nats = torch.zeros(3 * S), {(i, place): 0.0 for i in (0, 1) for place in (1, 2)}
        for ids in ids_NT.tolist():
            for i, attached in enumerate(([], [adapter])):
                logprobs = loop.read(ids, attached).log_softmax(-1)
                for place in (1, 2):
                    span = range(place * S + 1, (place + 1) * S)
                    nats[i, place] -= sum(float(logprobs[t - 1, ids[t]]) for t in span)
            fired_T += loop.fired_T
        switch = measured.adapters[name]
        blocks = sum(block is not None for block in adapter.blocks)
        assert switch.rates == pytest.approx((fired_T / (11 * blocks)).tolist(), abs=1e-6)
        own_before, before, own_after, after = (total / (11 * (S - 1)) for total in nats.values())
        assert (switch.before, switch.after) == (pytest.approx(before, rel=1e-5), pytest.approx(after, rel=1e-5))
        assert switch.difference.nats == pytest.approx(after - before, abs=1e-5)
        assert switch.own_difference.nats == pytest.approx(own_after - own_before, abs=1e-5)
        assert switch.windows == 11
        assert len(switch.after_by_place) == S - 1
        for mean, each in zip((before, after), zip(*switch.after_by_place, strict=True), strict=True):
            assert sum(each) / (S - 1) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    ("own", "again", "to_open", "to_shut"),
    [
        ([0.8] * 12, [0.0] * 12, 0, 0),
        ([0.1, 0.5, 0.71, 0.73, *[0.8] * 8], [0.6, 0.2, 0.05, 0.049, *[0.0] * 8], 3, 3),
        ([0.0] * 12, [0.3] * 12, None, None),
    ],
)
def test_a_gate_is_open_at_90_per_cent_of_its_steady_rate_and_shut_below_5(
    monkeypatch, own, again, to_open, to_shut
):
    rates, same = tuple([0.01] * 12 + own + again), module._Losses(2.0, (22.0, 22.0), (11, 11), (2.0,) * 11)
    monkeypatch.setattr(module, "_read", lambda *_: module._Reading(rates, same, same))
    text = SwitchText(torch.zeros(2, 36), ("en.b",), ("hu.a",))
    switch = switches(hosted(hu=learned(1, "hu")), {"hu": text}).adapters["hu"]
    assert (switch.tokens_to_open, switch.tokens_to_shut) == (to_open, to_shut)
    assert switch.steady == Steady(pytest.approx(0.01), pytest.approx(own[-1]), pytest.approx(again[-1]))


def test_the_steady_rate_is_that_of_a_stretchs_second_half():
    rates = [*range(5), *range(10, 15), *range(20, 25)]
    assert steady_rates(rates) == Steady(3.0, 13.0, 23.0)


def texts(first: int, count: int, *torn: int) -> Windows:
    """Windows of two stretches whose ids tell which they are; in those that are torn, another document begins."""
    offset_NT = torch.arange(2 * S).repeat(count, 1)
    for row in torn:
        offset_NT[row, 5:] -= 5
    ids_NT = torch.arange(first, first + count * 2 * S).view(count, 2 * S)
    return Windows(ids_NT % tiny.VOCAB, offset_NT)


def test_each_window_takes_up_the_original_text_again_where_it_broke_off():
    read = {"en.b": texts(0, 5, 1), "en.c": texts(120, 2), "hu.a": texts(170, 4, 0), "hu.z": texts(270, 1)}
    made = switch_texts(hosted(hu=learned(1, "hu")), read, windows=2)["hu"]
    b, c, a, z = (read[name].ids_NT for name in ("en.b", "en.c", "hu.a", "hu.z"))
    expected = [(b[0], a[0]), (c[0], z[0]), (b[2], a[2])]  # in b[1] another document begins
    rows = [torch.cat([around[:S], own[:S], around[S:]]) for around, own in expected]
    assert torch.equal(made.ids_NT, torch.stack(rows))
    assert (made.original, made.own) == (("en.b", "en.c"), ("hu.a", "hu.z"))


def test_the_text_that_is_put_in_does_not_begin_as_texts_do():
    read = {"en.b": texts(0, 1), "hu.a": texts(170, 1)}
    made = switch_texts(hosted(hu=learned(1, "hu")), read, windows=2, beginning=1)["hu"]
    around, own = (read[name].ids_NT[0] for name in ("en.b", "hu.a"))
    assert made.ids_NT.tolist() == [[*around[:S].tolist(), *own[1 : S + 1].tolist(), *around[S:].tolist()]]


def test_what_was_measured_is_not_measured_again(capsys):
    adapters = hosted(hu=learned(5, "hu"))
    ids_NT = torch.randint(0, tiny.VOCAB, (2, 3 * S), generator=torch.Generator().manual_seed(5))
    first, second = (switches(adapters, {"hu": SwitchText(ids_NT, ("en.b",), ("x",))}) for _ in range(2))
    assert first == second
    told = capsys.readouterr().err
    assert told.count("language switches, 1 of 1: hu; attached: hu (measured before)") == 1
    assert told.count("attached: none (measured before)") == 1


def test_text_that_is_missing_is_named():
    adapters = hosted(hu=learned(1, "hu"))
    with pytest.raises(BadRequest, match="what hu learned"):
        switch_texts(adapters, {"en.b": texts(0, 4), "da.a": texts(0, 4)}, 2)
    with pytest.raises(BadRequest, match="the base's own language"):
        switch_texts(adapters, {"hu.a": texts(0, 4)}, 2)
    with pytest.raises(BadRequest, match="no document in the base's own language is as long as two stretches"):
        switch_texts(adapters, {"hu.a": texts(0, 4), "en.b": texts(0, 1, 0)}, 2)


def test_the_report_becomes_json_a_table_and_a_plot(tmp_path):
    adapters = {"hu": learned(1, "hu"), "da": learned(2, "da")}
    ids_NT = torch.randint(0, tiny.VOCAB, (2, 3 * S), generator=torch.Generator().manual_seed(3))
    report = switches(hosted(**adapters), {name: SwitchText(ids_NT, ("en.b",), ("x",)) for name in adapters})
    read = json.loads(json.dumps(report.document()))
    assert (read["stretch"], list(read["adapters"]), len(read["adapters"]["hu"]["rates"])) == (
        S,
        ["hu", "da"],
        3 * S,
    )
    never = SwitchReport(S, {"hu": replace(report.adapters["hu"], tokens_to_open=None, tokens_to_shut=4)})
    header, row = switch_rows(never)
    assert dict(zip(header, row, strict=True))["TOKENS TO OPEN"] == "never"
    assert dict(zip(header, row, strict=True))["TOKENS TO SHUT"] == "4"
    (one,) = plot_switches(tmp_path, report, ".svg").values()
    drawn = one.read_bytes()
    plot_switches(tmp_path, never, ".svg")
    assert drawn != one.read_bytes()
