"""The measurements of speed: counted by hand where they count, and run against a server without a model."""

import asyncio
import itertools
import json
from types import SimpleNamespace

import httpx
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.fakes import serving
from tests.unit.test_scripts import load

ASKED = ["--requests", "3", "--rounds", "2", "--tokens", "4", "--prompt-tokens", "5"]


@pytest.fixture
def base_folder(tmp_path):
    return str(tiny.save(tiny.model(), tmp_path / "base"))


def test_contenders_are_measured_in_rounds_that_begin_with_another_each_time(
    base_folder, tmp_path, monkeypatch, capsys
):
    kept = tmp_path / "results" / "serving.json"
    with serving() as one, serving() as other:
        named = ["--contender", f"one={one.url}", "--contender", f"other={other.url}", "--save", str(kept)]
        script = load("loadtests/serving.py")
        monkeypatch.setattr(script.Contender, "processes", lambda _: [])  # this process: not to be paused
        script.main([*named, *ASKED, "--concurrency", "1", "2", "--rate", "50", "--base", base_folder])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(kept.read_text()) == result
    order = [m["contender"] for m in result["measurements"] if m.get("concurrency") == 1]
    assert order == ["one", "other", "other", "one"]
    assert [m["tokens"] for m in result["measurements"] if m.get("concurrency") == 2] == [16] * 4
    assert [m["tokens"] for m in result["measurements"] if "rate" in m] == [12] * 4
    assert result["contenders"]["one"]["fields"] == ["ignore_eos", "stream_options"]
    ratios = [row["ratios"]["throughput"] for row in result["summary"] if "ratios" in row]
    assert len(ratios) == 3
    assert all(r["least"] <= r["median"] <= r["most"] for r in ratios)


def test_contenders_are_started_anew_for_further_rounds(base_folder, monkeypatch, capsys):
    starts = []
    with serving() as one:
        script = load("loadtests/serving.py")
        monkeypatch.setattr(script.Contender, "processes", lambda _: [])
        started = script.started
        monkeypatch.setattr(script, "started", lambda *given: starts.append(given) or started(*given))
        script.main(
            ["--contender", f"one={one.url}", *ASKED, "--starts", "3", "--concurrency", "1", "--base", base_folder]
        )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(starts) == 3
    assert [m["round"] for m in result["measurements"]] == [0, 1, 2, 3, 4, 5]
    assert [row["rounds"] for row in result["summary"]] == [6]


def test_a_stretch_of_text_without_a_space_is_a_prompt_too():
    texts = load("loadtests/prompts.py").Texts({"en": "|---" * 100}, tiny.tokenizer(), 0)
    assert all(len(prompt.text) == 5 for prompt in texts.take(20, 5))


def test_ratios_are_of_one_round_and_medians_over_rounds():
    serving_script = load("loadtests/serving.py")
    rows = []
    for number, (a, b) in enumerate([(10, 5), (10, 20), (30, 10)]):
        same = dict.fromkeys(("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "itl_mean"), 1.0) | {"memory_mib": None}
        rows += [
            {"round": number, "contender": n, "concurrency": 1, "throughput": t} | same
            for n, t in (("a", a), ("b", b))
        ]
    ours, theirs = serving_script.compare(rows)
    assert (ours["throughput"], theirs["throughput"]) == (10, 10)
    assert theirs["ratios"]["throughput"] == {"median": 2, "least": 0.5, "most": 3}
    assert "ratios" not in ours


def sse(*chunks) -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def asked(handler) -> list:
    script = load("loadtests/load.py")

    async def all_of_them():
        async with httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(handler)) as http:
            return await script.at_concurrency(http, [{"n": i} for i in range(5)], 2)

    return asyncio.run(all_of_them())


def test_every_request_is_asked_once_and_its_tokens_are_the_servers_count():
    seen = []

    def answer(request):
        seen.append(json.loads(request.content)["n"])
        text = [{"choices": [{"text": "a"}]}, {"choices": [{"text": ""}]}]
        return httpx.Response(
            200, text=sse(*text, {"choices": [], "usage": {"completion_tokens": 7, "prompt_tokens": 2}})
        )

    answers = asked(answer)
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert {(a.tokens, a.prompt_tokens, len(a.arrivals)) for a in answers} == {(7, 2, 1)}


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(500, text="broken"),
        httpx.Response(200, text=sse({"error": {"message": "broken"}})),
        httpx.Response(200, text=sse({"choices": [{"text": "a"}]})),
    ],
    ids=["a status", "in the stream", "no usage"],
)
def test_a_failed_answer_ends_the_measurement(response):
    with pytest.raises(ExceptionGroup) as raised:
        asked(lambda request: response)
    assert type(raised.value.exceptions[0]).__name__ == "Refused"


def test_latencies_are_of_the_answers_times():
    script = load("loadtests/load.py")
    answers = [
        script.Answer(started=0.0, arrivals=(0.1, 0.2, 0.4), ended=0.4, tokens=3, prompt_tokens=5),
        script.Answer(started=0.4, arrivals=(0.7, 0.8), ended=1.0, tokens=3, prompt_tokens=5),
    ]
    got = script.summarise(answers)
    assert got["throughput"] == pytest.approx(6)
    assert (got["ttft_p50"], got["ttft_p99"]) == (pytest.approx(100), pytest.approx(300))
    assert (got["itl_p50"], got["itl_p99"]) == (pytest.approx(100), pytest.approx(200))
    assert got["itl_mean"] == pytest.approx((150 + 50) / 2)
    assert script.percentile(range(1, 201), 99) == 198


def test_a_server_that_knows_no_more_fields_is_asked_without_them(monkeypatch):
    contenders = load("loadtests/contenders.py")

    def answer(request):
        extra = json.loads(request.content).keys() & {"ignore_eos", "stream_options"}
        return httpx.Response(422 if extra else 200, json={})

    contender = contenders.Contender("x", "", "http://x")
    with httpx.Client(base_url="http://x", transport=httpx.MockTransport(answer)) as http:
        assert contenders._learn(contender, "m-{language}", http)
    assert contender.extras == {}
    assert contender.body("text", "hu", 3)["model"] == "m-hu"


def test_prompts_take_the_languages_in_turn_and_are_no_longer_than_asked():
    prompts = load("loadtests/prompts.py")
    texts = prompts.Texts({"en": "the cat sat " * 90, "hu": "őrült űr " * 90}, tiny.tokenizer(), 0)
    got = texts.take(4, 10)
    assert [p.language for p in got] == ["en", "hu", "en", "hu"]
    assert all(8 <= len(p.text.encode()) <= 10 for p in got)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(p.text for p in got)


# Two layers, d 4, 2 heads and 1 key-value head of 3, FFN 5, vocabulary 7.
TINY = {"layers": 2, "d": 4, "heads": 2, "kv_heads": 1, "head_size": 3, "ffn": 5, "vocab": 7}


def test_a_decode_step_is_counted_as_by_hand():
    roofline = load("loadtests/roofline.py")
    step = roofline.Step(sequences=3, tokens=1, context=9, attached=2, fired=1, width=6)
    got = {c.part: (c.bytes, c.operations) for c in roofline.costs(roofline.Shape(**TINY), step, 2)}
    assert got == {
        "projections": (2 * 144, 2 * 144 * 3),  # q 4*6, k and v 4*3 each, o 6*4: 72 a layer
        "attention": (2 * 360, 1440),  # 10 places * 2 * 3 numbers * 2 layers * 3; 2 heads * 3 * 10 * 2 * 2 * 2 * 3
        "ffn": (2 * 120, 2 * 120 * 3),
        "head": (2 * 28, 2 * 28 * 3),
        "gates": (2 * 16, 2 * 16 * 3),
        "blocks": (2 * 144, 2 * 144 * 3),  # 3 matrices of 4*6, 2 layers
    }


def test_a_prefill_step_sees_only_what_came_before_and_computes_one_row_of_logits():
    roofline = load("loadtests/roofline.py")
    step = roofline.Step(sequences=1, tokens=3, context=0)
    got = {c.part: (c.bytes, c.operations) for c in roofline.costs(roofline.Shape(**TINY), step, 4)}
    assert got["attention"] == (4 * 36, 2 * 2 * 6 * (1 + 2 + 3) * 2)
    assert got["head"] == (4 * 28, 2 * 28)
    assert got["blocks"] == (0, 0)


def test_a_part_takes_the_longer_of_its_times():
    roofline = load("loadtests/roofline.py")
    ceilings = roofline.Ceilings(bytes_a_second=10, operations_a_second=100)
    assert roofline.Cost("x", 20, 100).seconds(ceilings) == 2
    assert roofline.Cost("x", 20, 300).seconds(ceilings) == 3


def test_the_share_reached_is_the_time_at_the_ceilings_over_the_measured(base_folder, capsys):
    asked = ["--model", base_folder, "--batch", "2", "--context", "9", "--ceilings", "1", "1", "--measured", "2"]
    load("loadtests/roofline.py").main(asked)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (step,) = result["steps"]
    assert step["share"] == pytest.approx(step["milliseconds"] / 2)
    assert result["shape"]["layers"] == tiny.LAYERS


def test_loras_differ_from_each_other_and_from_their_base(base_folder, tmp_path, capsys):
    load("loadtests/loras.py").main(["hu", "da", "--out", str(tmp_path), "--base", base_folder, "--rank", "2"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    ids = torch.tensor([[5, 6, 7]])
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    sides = [sum(m.weight.shape) for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert said["parameters"] == 2 * sum(sides)
    with torch.no_grad():
        logits = [base(ids).logits]
        for name in ("hu", "da"):
            lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / name)
            logits.append(lora(ids).logits)
    for one, other in itertools.combinations(logits, 2):
        assert (one - other).abs().max() > 1e-6


def test_the_shape_is_read_where_a_configuration_leaves_sizes_out():
    roofline = load("loadtests/roofline.py")
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "intermediate_size": 9,
        "vocab_size": 7,
    }
    shape = roofline.Shape.of(SimpleNamespace(**sizes))
    assert (shape.kv_heads, shape.head_size) == (4, 2)


def test_step_times_are_of_steps_in_which_the_whole_batch_decodes(base_folder, capsys):
    flags = ["--batch", "1", "3", "--context", "9", "--steps", "4", "--prefill", "20", "--repeats", "1"]
    load("loadtests/steps.py").main(["--model", base_folder, *flags])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["kind"], row["batch"], row["tokens"]) for row in rows] == [
        ("decode", 1, 9),
        ("decode", 3, 9),
        ("prefill", 1, 20),
    ]
    assert [row["rate"] * row["seconds"] for row in rows] == [pytest.approx(n) for n in (1, 3, 20)]


def test_steps_with_adapters_and_with_none_take_turns(base_folder, monkeypatch, capsys):
    script = load("loadtests/bank.py")
    shut, fired = script.Contender(3), script.Contender(3, fired=True)
    decode, prefill = script.Workload(2, 1, 4), script.Workload(1, 8)
    monkeypatch.setattr(script, "CONTENDERS", (shut, fired))
    monkeypatch.setattr(script, "WORKLOADS", (decode, prefill))
    run, steps = script.Runner.run, []

    def watched(self, pieces, labels):
        results = run(self, pieces, labels)
        steps.append((len(self.bank.attached), sum(map(sum, self.bank.read_totals().fired_LS))))
        return results

    monkeypatch.setattr(script.Runner, "run", watched)
    script.main(["--model", base_folder, "--pairs", "4"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: len(pairs) for name, pairs in result["seconds"][decode.name].items()} == {
        "3 shut": 4,
        "3 fired": 4,
    }
    for low, median, up in result["ratios"][prefill.name].values():
        assert 0 < low <= median <= up
    none, each = (0, 0), tiny.LAYERS
    expected = []
    for tokens in (0, each):
        on = [(3, tokens * count) for count in (2 * 3, 2, 7)]  # a text's first token does not fire
        expected += [none, on[0], on[1], none, *[none, on[1], on[1], none] * 2]
        expected += [on[2], none, none, on[2], on[2], none]
    assert steps == expected


def test_streams_are_read_with_and_without_loads_in_turn(base_folder, monkeypatch, capsys):
    script = load("loadtests/swaps.py")
    read, readings = script.Swaps.read, []

    def watched(self, streams, tokens, files, every):
        reading = read(self, streams, tokens, files, every)
        readings.append((len(files), len(reading.gaps), len(reading.loads)))
        return reading

    monkeypatch.setattr(script.Swaps, "read", watched)
    flags = ["--streams", "2", "--tokens", "6", "--loads", "2", "--every", "0", "--rounds", "2", "--width", "3"]
    script.main(["--model", base_folder, *flags])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    warm_up, none, two = (0, 2 * 7, 0), (0, 2 * 5, 0), (2, 2 * 5, 2)
    assert readings == [warm_up, two, none, two, none, none, two, none, two]
    assert [(row["kind"], len(row["loads"])) for row in result["rows"]] == [("new", 2), ("known", 2)] * 2
    assert all(row["ratios"]["p99"] == row["with"]["p99"] / row["without"]["p99"] for row in result["rows"])
