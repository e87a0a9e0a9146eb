"""`--dtype auto` on a CPU: bfloat16 only where it is clearly faster in decode and prefill alike."""

import logging

import pytest
import torch

from nr_serve import machine
from nr_serve.config import ServeConfig
from nr_serve.engine.model import auto_dtype, base, packed_linear
from tests import tiny


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Nothing measured before."""
    monkeypatch.setenv("NR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("decode", "prefill", "chosen"),
    [
        (1.5, 3.0, torch.bfloat16),
        (1.5, 0.6, torch.float32),
        (0.9, 3.0, torch.float32),
        (1.1, 1.1, torch.float32),
    ],
)
def test_bfloat16_is_chosen_if_it_is_clearly_faster_everywhere(decode, prefill, chosen, monkeypatch, caplog):
    speed = {8: decode, 256: prefill}
    monkeypatch.setattr(auto_dtype, "_ratio", lambda layers, tokens: speed[tokens])
    with caplog.at_level(logging.INFO):
        assert auto_dtype.fastest_dtype() is chosen
    assert f"dtype auto: {str(chosen).removeprefix('torch.')}" in caplog.text
    assert f"{decode}x at 8 tokens" in caplog.text


def test_the_measurement_runs_on_one_thread_and_gives_the_others_back(monkeypatch):
    threads = []
    monkeypatch.setattr(auto_dtype, "_ratio", lambda layers, tokens: threads.append(torch.get_num_threads()) or 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        auto_dtype.fastest_dtype()
        assert (set(threads), torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)


def test_what_counts_is_the_time_computed_not_the_time_waited(monkeypatch):
    now = {"computed": 0.0}
    monkeypatch.setattr(auto_dtype.time, "thread_time", lambda: now["computed"])

    def layer(*seconds):
        each = iter(seconds * auto_dtype._ROUNDS)
        return lambda x: now.update(computed=now["computed"] + next(each))

    layers = {torch.float32: layer(3.0, 9.0), torch.bfloat16: layer(9.0, 2.0)}
    assert auto_dtype._ratio(layers, 1) == pytest.approx(1.5), "the best of each"


@pytest.mark.parametrize("packs", [True, False])
def test_the_measurement_runs_with_packed_weights_and_without(packs, monkeypatch):
    monkeypatch.setattr(auto_dtype, "_SIZE", 64)
    can_pack, ratio, measured = packed_linear.can_pack, auto_dtype._ratio, []
    if not packs:
        monkeypatch.setattr(auto_dtype, "can_pack", lambda dtype: False)
    monkeypatch.setattr(auto_dtype, "_ratio", lambda layers, n: measured.append(layers) or ratio(layers, n))
    auto_dtype.fastest_dtype()
    kinds = {dtype: isinstance(layer, packed_linear.PackedLinear) for dtype, layer in measured[0].items()}
    assert kinds == {dtype: packs and can_pack(dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.fixture
def speeds(monkeypatch):
    """What each measurement will find, for any number of tokens; it must be asked no more often."""
    found = []
    monkeypatch.setattr(auto_dtype, "_TOKENS", (8,))
    monkeypatch.setattr(auto_dtype, "_ratio", lambda layers, tokens: found.pop(0))
    return found


@pytest.mark.parametrize(("first", "chosen"), [(1.5, torch.bfloat16), (1.0, torch.float32)])
def test_what_was_chosen_is_chosen_again_and_the_log_says_where_it_is_from(first, chosen, speeds, cache, caplog):
    speeds.append(first)
    with caplog.at_level(logging.INFO):
        assert auto_dtype.fastest_dtype() is chosen
        assert "measured now" in caplog.text
        caplog.clear()
        assert auto_dtype.fastest_dtype() is chosen
    (kept,) = (cache / "dtype").iterdir()
    assert f"as measured at an earlier start ({kept})" in caplog.text


@pytest.mark.parametrize("change", ["processor", "cores", "torch"])
def test_another_processor_core_count_or_torch_is_measured_anew(change, speeds, monkeypatch, tmp_path):
    speeds += [1.5, 1.0]
    assert auto_dtype.fastest_dtype() is torch.bfloat16
    if change == "processor":
        other = tmp_path / "cpuinfo"
        other.write_text("processor\t: 0\nmodel name\t: Another\n\nprocessor\t: 1\n")
        monkeypatch.setattr(machine, "_CPUINFO", other)
    elif change == "cores":
        monkeypatch.setattr(auto_dtype.os, "cpu_count", lambda: 1000)
    else:
        monkeypatch.setattr(torch, "__version__", "0.0")
    assert auto_dtype.fastest_dtype() is torch.float32


@pytest.mark.parametrize("content", [b"", b"[]", b'{"dtype": "int8"}', b"\xff"])
def test_a_damaged_choice_is_made_again(content, speeds, cache, caplog):
    speeds += [1.0, 1.5]
    auto_dtype.fastest_dtype()
    (kept,) = (cache / "dtype").iterdir()
    kept.write_bytes(content)
    assert auto_dtype.fastest_dtype() is torch.bfloat16
    assert "is damaged" in caplog.text
    assert auto_dtype.fastest_dtype() is torch.bfloat16


def test_a_choice_that_cannot_be_kept_is_used_and_said(speeds, cache, caplog):
    cache.write_text("a file where the folder should be")
    speeds.append(1.5)
    assert auto_dtype.fastest_dtype() is torch.bfloat16
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("asked", "loaded"), [("auto", torch.bfloat16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_only_auto_measures(asked, loaded, monkeypatch, tmp_path):
    measured = []

    def measure():
        measured.append(True)
        return torch.bfloat16

    monkeypatch.setattr(base, "fastest_dtype", measure)
    folder = tiny.save(tiny.model(), tmp_path / "tiny")
    model = base.load_base(folder, ServeConfig(dtype=asked, device="cpu"))
    assert next(model.parameters()).dtype is loaded
    assert bool(measured) == (asked == "auto")
