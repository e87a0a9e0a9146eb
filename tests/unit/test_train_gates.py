"""Fitted gates: exact least squares and logistic regression, thresholds that hold, layer after layer."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from nr_serve.neutral import math
from nr_serve.train import gate_cache
from nr_serve.train import gates as module
from nr_serve.train.attach import Attached
from nr_serve.train.blocks import AdapterModule
from nr_serve.train.gates import FittedGates, Fitter, LayerFit, causal_mean, evidence, fit_gates, gate_classes
from nr_serve.train.recipe import BadRecipe, Gate
from nr_serve.train.solvers import CHUNK_TOKENS, SOLVERS, solve_logistic, solve_ridge
from nr_serve.train.text.classes import CHAT, Classes
from nr_serve.train.text.frames import Chat, Frames
from nr_serve.train.text.lead_in import GateText, led_into
from nr_serve.train.text.pack import Windows
from tests import tiny


def classes(count: int = 60, length: int = 16) -> dict[str, Windows]:
    """Three classes of windows that use different tokens, most of the time."""
    g = torch.Generator().manual_seed(5)
    made = {}
    for i, name in enumerate(("target", "en", "da")):
        own = torch.randint(i * 8, i * 8 + 8, (count, length), generator=g)
        any_ = torch.randint(0, 24, (count, length), generator=g)
        ids = torch.where(torch.rand(count, length, generator=g) < 0.8, own, any_)
        made[name] = Windows(ids, torch.arange(length).expand(count, length) % 8)
    return made


def plain_texts(named: dict[str, Windows]) -> dict[str, GateText]:
    return {name: GateText.whole(windows) for name, windows in named.items()}


def second_half(windows: Windows) -> Windows:
    """Those that calibrate a gate."""
    return windows.take(slice(len(windows) // 2, None))


@pytest.mark.parametrize(("tokens", "dtype"), [(500, np.float64), (2 * CHUNK_TOKENS + 7, np.float32)])
def test_ridge_equals_weighted_least_squares_in_float64(tokens, dtype):
    g = np.random.default_rng(0)
    drawn = g.normal(size=(tokens, 7)) + 3, g.normal(size=tokens), g.uniform(0.1, 2, size=tokens)
    given = [a.astype(dtype) for a in drawn]
    ridge = 0.01
    w, b = solve_ridge(*(torch.from_numpy(a) for a in given), ridge)
    u, y, weight = (a.astype(np.float64) for a in given)
    p = weight / weight.sum()
    centred = u - p @ u
    penalty = ridge * (p @ centred**2).mean()
    rows = np.vstack([np.sqrt(p)[:, None] * centred, np.sqrt(penalty) * np.eye(7)])
    expected = np.linalg.lstsq(rows, np.concatenate([np.sqrt(p) * (y - p @ y), np.zeros(7)]), rcond=None)[0]
    assert np.allclose(w.numpy(), expected, atol=1e-10)
    assert float(b) == pytest.approx(p @ y - (p @ u) @ expected, abs=1e-9)


def plain(g):
    """Features of the same kind, with the offset and scale that a stream may have."""
    u = g.normal(size=(400, 5)) * 2 + 1
    return u, u[:, 0] - 0.5 * u[:, 1] > 1 - g.logistic(size=400)


def far_outliers(g):
    """Features of which a few values are hundreds of times the others'."""
    z = g.normal(size=(400, 5))
    return z**5, z[:, 0] > 1 - g.logistic(size=400)


def repeated(g):
    """Each feature twice."""
    u = g.normal(size=(400, 3))
    return np.hstack([u, u]), u[:, 0] > 1 - g.logistic(size=400)


@pytest.mark.parametrize("made", [plain, far_outliers, repeated])
@pytest.mark.parametrize("ridge", [0.01, 1e-4])
def test_logistic_regression_equals_scikit_learns(made, ridge):
    g = np.random.default_rng(2)
    u, y = made(g)
    weight = np.where(y, 0.2, 1.0) * g.uniform(0.5, 2, size=400)
    w, b = solve_logistic(*(torch.from_numpy(a) for a in (u, y.astype(float), weight)), ridge)
    p = weight / weight.sum()
    scale = np.sqrt((p @ (u - p @ u) ** 2).mean())
    reference = LogisticRegression(C=1 / ridge, tol=1e-10, max_iter=1000)
    reference.fit((u - p @ u) / scale, y, sample_weight=p)
    expected = reference.coef_[0] / scale
    assert np.allclose(w.numpy(), expected, rtol=1e-3, atol=1e-3 * abs(expected).max())
    assert float(b) == pytest.approx(reference.intercept_[0] - (p @ u) @ expected, rel=1e-3)


def test_kept_gates_are_those_that_were_fitted_unless_the_format_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("NR_CACHE", str(tmp_path))
    key = {"gate": "any"}
    fits = [FittedGates({"w": torch.rand(3)}, {2: LayerFit(0.1 + 0.2, {"en": 1 / 3})}) for _ in range(2)]
    made = iter(fits)
    gate_cache.kept(key, lambda: next(made))
    kept = gate_cache.kept(key, lambda: next(made))
    assert torch.equal(kept.gates["w"], fits[0].gates["w"])
    assert kept.report == fits[0].report
    monkeypatch.setattr(gate_cache, "GATE_FORMAT", gate_cache.GATE_FORMAT + 1)
    assert gate_cache.kept(key, lambda: next(made)) is fits[1]


@pytest.mark.parametrize("init", list(SOLVERS))
def test_original_and_background_text_have_percentiles_of_their_own(init):
    model = tiny.model()
    adapter = AdapterModule.fresh([16] * tiny.LAYERS, tiny.D, carry=0.5, seed=0)
    gate = Gate(init=init, percentile=99.0, background_percentile=70.0)
    report = fit_gates(model, Attached(model, [adapter]), plain_texts(classes()), gate, original=("en",)).report
    for fit in report.values():
        assert fit.misfired["en"] <= 5 / 420  # a percentile lies between two of so many tokens
        assert fit.misfired["da"] <= 0.301
        assert max(fit.misfired["en"] / 0.01, fit.misfired["da"] / 0.3) > 0.9


def test_a_gate_fitted_on_causal_means_is_the_carried_gate_but_for_the_weight_of_the_evidence():
    g = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(2, 9, 5, generator=g), torch.randn(5, generator=g), torch.tensor(0.3)
    offset = torch.arange(9).expand(2, 9) % 6
    u, e = causal_mean(x, offset, 0.7), evidence(offset, 0.7)
    for row in range(2):
        for document in (slice(0, 6), slice(6, 9)):
            m = math.carry(math.gate_logit(x[row, document], w, b), 0.7)
            assert torch.allclose(e[row, document] * (u[row, document] @ w + b), m, atol=1e-6)


@pytest.mark.parametrize("a", [0.0, 0.7])
def test_a_causal_mean_is_the_weighted_mean_of_a_documents_tokens_but_the_first(a):
    g = torch.Generator().manual_seed(0)
    x, offset = (
        torch.randn(2, 9, 5, generator=g),
        torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2], [0, 1, 0, 1, 2, 0, 0, 1, 2]]),
    )
    u = causal_mean(x, offset, a)
    for row in range(2):
        for t in range(9):
            own = x[row, t - offset[row, t] : t + 1].double()
            weight = [a ** (len(own) - 1 - i) for i in range(1, len(own))]
            mean = sum(w * x_i for w, x_i in zip(weight, own[1:], strict=True)) / sum(weight) if weight else own[0]
            assert torch.allclose(u[row, t].double(), mean, atol=1e-6)


def test_the_summary_tells_the_mean_share_found_and_the_worst_misfire():
    report = {0: LayerFit(0.5, {"en": 0.01, "da": 0.002}), 3: LayerFit(0.7, {"en": 0.0, "da": 0.0325})}
    expected = "gates find 60.0% of the target, misfire on at most 3.25% of a class in a layer, at threshold 0"
    assert FittedGates({}, report).summary() == expected


def test_fitted_gates_hold_the_percentile_and_find_the_target():
    model = tiny.model()
    adapter = AdapterModule.fresh([16] * tiny.LAYERS, tiny.D, carry=0.5, seed=0)
    attached = Attached(model, [adapter])
    named = classes()
    gate = Gate(percentile=95.0, background_percentile=95.0)
    report = fit_gates(model, attached, plain_texts(named), gate).report
    for name, windows in named.items():
        checked = second_half(windows)
        record = attached.begin(checked.offset_NT)
        with torch.no_grad():
            model.model(checked.ids_NT, use_cache=False, position_ids=checked.offset_NT)
        for layer in range(tiny.LAYERS):
            share = record.fired[0][layer] / int((checked.offset_NT > 0).sum())  # not on a text's first token
            fit = report[layer]
            assert share == pytest.approx(fit.found if name == "target" else fit.misfired[name], abs=0.02)
            assert name == "target" or share <= 0.06
    assert report[0].found > 0.5


def test_above_a_trained_block_the_percentile_is_of_the_tokens_it_does_not_act_on():
    model, named = tiny.model(), classes()
    adapter = AdapterModule.fresh([16] * tiny.LAYERS, tiny.D, carry=0.5, seed=0)
    adapter.threshold = 0.1
    for i in range(tiny.LAYERS):
        adapter.layer(i).w_out.data.normal_(generator=torch.Generator().manual_seed(i))
    attached = Attached(model, [adapter])
    gate = Gate(percentile=90.0, background_percentile=90.0)
    report = fit_gates(model, attached, plain_texts(named), gate).report

    moved, opened = {name: torch.zeros(0) for name in named}, {name: [] for name in named}
    for name, windows in named.items():
        checked = second_half(windows)
        told = checked.offset_NT.flatten() > 0
        moved[name] = torch.zeros_like(told)
        record = attached.begin(checked.offset_NT)

        def look(layer, x_Td, checked=checked, told=told, name=name):
            m_T = adapter.layer(layer).carried(x_Td, checked.offset_NT.flatten(), 0.5).detach()
            opened[name].append((m_T[told & ~moved[name]] > 0).float().mean())
            assert (m_T[told] > 0).float().mean() == pytest.approx(
                report[layer].found if name == "target" else report[layer].misfired[name], abs=0.02
            )

        attached.before = look
        record.on_gates = lambda _, __, g_T, name=name: moved[name].logical_or_(g_T > 0)
        with torch.no_grad():
            model.model(checked.ids_NT, use_cache=False, position_ids=checked.offset_NT)
        attached.before = None
    for layer in range(tiny.LAYERS):
        worst = max(opened[name][layer] for name in ("en", "da"))
        assert worst == pytest.approx(0.1, abs=0.02)
    assert moved["en"].any() or moved["da"].any()


@pytest.mark.parametrize("trained", [True, False])
def test_tokens_on_which_a_trained_block_acts_take_no_further_part_but_for_the_targets(trained):
    adapter = AdapterModule.fresh([16, 16], tiny.D, carry=0.5, seed=0)
    adapter.threshold = 0.1
    if trained:
        adapter.layer(0).w_out.data[3, 5] = 1.0
    fitter = Fitter(adapter, plain_texts(classes()), "target", Gate(percentile=90.0, background_percentile=90.0))
    x_Td = torch.randn(len(fitter.class_T), tiny.D, generator=torch.Generator().manual_seed(0))
    x_Td[fitter.target_T, 0] += 2.0
    fitter.fit(0, x_Td)
    acts_T = adapter.layer(0).carried(x_Td, fitter.offset_NT.flatten(), 0.5) > 0.1
    assert all((acts_T & (fitter.class_T == i)).any() for i in range(3))
    assert torch.equal(fitter.moved_T, acts_T & ~fitter.target_T & trained)


def test_classes_that_lower_blocks_have_moved_as_a_whole_have_no_say(monkeypatch):
    seen, solve = {}, SOLVERS["logistic"]

    def noting(u_Td, target_T, weight_T, ridge):
        seen["target"] = float(weight_T[target_T > 0].sum() / weight_T.sum())
        return solve(u_Td, target_T, weight_T, ridge)

    monkeypatch.setitem(SOLVERS, "logistic", noting)
    named = classes()
    adapter = AdapterModule.fresh([16], tiny.D, carry=0.5, seed=0)
    fitter = Fitter(adapter, plain_texts(named), "target", Gate(percentile=90.0, background_percentile=90.0))
    fitter.moved_T = fitter.class_T == 2
    x_Td = torch.randn(len(fitter.class_T), tiny.D, generator=torch.Generator().manual_seed(0))
    x_Td[fitter.target_T | fitter.moved_T, 0] += 6.0  # da looks like the target: with a say it would shut the gate
    fitter.fit(0, x_Td)
    assert fitter.report[0].misfired["en"] == pytest.approx(0.1, abs=0.02)
    assert fitter.report[0].misfired["da"] > 0.9
    assert seen["target"] == pytest.approx(Gate().target_weight), "what is left shares what is left"


def test_no_gate_is_fitted_to_what_is_not_finite():
    fitter = Fitter(AdapterModule.fresh([16], tiny.D, carry=0.5, seed=0), plain_texts(classes()), "target", Gate())
    x_Td = torch.zeros(len(fitter.class_T), tiny.D)
    x_Td[3, 1] = torch.nan
    with pytest.raises(BadRecipe, match="layer 0's FFN reads is not finite"):
        fitter.fit(0, x_Td)


def test_with_all_other_tokens_moved_a_gate_opens_on_the_whole_target():
    fitter = Fitter(AdapterModule.fresh([16], tiny.D, carry=0.5, seed=0), plain_texts(classes()), "target", Gate())
    fitter.moved_T = ~fitter.target_T
    fitter.fit(0, torch.randn(len(fitter.class_T), tiny.D, generator=torch.Generator().manual_seed(0)))
    assert fitter.report[0].found == 1
    assert all(tensor.isfinite().all() for tensor in fitter.adapter.gates().values())


def test_a_gate_that_finds_nothing_is_finite_and_kept_unless_more_is_asked_for():
    adapter = AdapterModule.fresh([16], tiny.D, carry=0.5, seed=0)
    fitter = Fitter(adapter, plain_texts(classes()), "target", Gate(min_found=0.0))
    x_Td = torch.randn(len(fitter.class_T), tiny.D, generator=torch.Generator().manual_seed(0))
    x_Td[fitter.target_T & fitter.fits_T, 0] += 9.0
    x_Td[fitter.target_T & fitter.checks_T, 0] -= 9.0
    fitter.fit(0, x_Td)
    assert fitter.report[0].found == 0
    assert adapter.layer(0) is not None
    assert all(tensor.isfinite().all() for tensor in adapter.gates().values())


@pytest.mark.parametrize(
    ("gate", "mean"),
    [(Gate(), 3.0), (Gate(kind="relu"), 1.0), (Gate(kind="relu", steepness=2.5), 2.5)],
    ids=["relu1", "relu", "steepness"],
)
def test_the_carried_logit_averages_the_steepness_where_it_opens_on_the_target(gate, mean):
    model, named = tiny.model(), classes()
    adapter = AdapterModule.fresh([16] * tiny.LAYERS, tiny.D, carry=0.5, seed=0)
    seen = {}
    attached = Attached(model, [adapter])
    fit_gates(model, attached, plain_texts(named), gate)
    checked = second_half(named["target"])

    def look(layer, x):
        m_T = adapter.layer(layer).carried(x, checked.offset_NT.flatten(), 0.5).detach()
        seen[layer] = torch.relu(m_T)

    attached.before = look
    attached.begin(checked.offset_NT)
    model.model(checked.ids_NT, use_cache=False, position_ids=checked.offset_NT)
    for g in seen.values():
        assert float(g[g > 0].mean()) == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize(("tokens", "windows"), [(100, 6), (1, 2), (960, 60), (10_000, 60)])
def test_a_fit_reads_so_many_tokens_of_each_class_and_four_times_that_of_the_target(tokens, windows):
    named = classes()
    read = gate_classes(Classes(named["target"], {"en": named["en"]}, {"da": named["da"]}), tokens)
    assert {name: len(each.windows) for name, each in read.items()} == {
        "target": min(4 * windows, 60),
        "en": windows,
        "da": windows,
    }
    for name, each in read.items():
        count = len(each.windows)
        expected = named[name].take([i * 60 // count for i in range(count)])  # they are spread over the text
        assert torch.equal(each.windows.ids_NT[::2], expected.ids_NT[::2])
        changed = [
            not torch.equal(*rows) for rows in zip(each.windows.ids_NT[1::2], expected.ids_NT[1::2], strict=True)
        ]
        assert all(changed) if name != "en" else not any(changed), "half is led into, but for original text"


def test_plain_original_text_and_chats_lead_into_the_target_and_background_text():
    rows = torch.arange(24 * 10).view(24, 10)
    named = {"target": rows, "en": rows + 1000, CHAT: rows + 2000, "da": rows + 3000}
    target, en, chat, da = (Windows(ids, torch.arange(10).expand(24, 10)) for ids in named.values())
    frames = Frames((), Chat((5000,), (5001,)))
    read = gate_classes(Classes(target, {"en": en, CHAT: chat}, {"da": da}, frames=frames), 240)
    for name, own in (("target", range(240)), ("da", range(3000, 3240))):
        pages, chats = read[name].windows.ids_NT[1::4].tolist(), read[name].windows.ids_NT[3::4].tolist()
        assert all(1000 <= row[0] < 1240 and row[-1] in own for row in pages)
        assert all(row[0] == 5000 and 5001 in row and row[-1] in own for row in chats)
    for name in ("en", CHAT):
        assert torch.equal(read[name].windows.ids_NT, named[name])


def test_four_times_as_much_is_read_of_background_that_other_adapters_act_on():
    named = classes()
    background = {"da": named["da"], "sk": named["da"]}
    read = gate_classes(Classes(named["target"], {"en": named["en"]}, background), 160, contested=["da", "unknown"])
    assert {name: len(text.windows) for name, text in read.items()} == {"target": 40, "en": 10, "da": 40, "sk": 10}


@pytest.mark.parametrize("init", list(SOLVERS))
def test_a_gates_direction_is_that_of_the_first_half_alone(init):
    named = classes()
    adapters = [AdapterModule.fresh([16], tiny.D, carry=0.5, seed=0) for _ in range(3)]
    fitters = [Fitter(adapter, plain_texts(named), "target", Gate(init=init)) for adapter in adapters]
    length = named["target"].ids_NT.shape[1]
    second_T = torch.cat([torch.arange(len(c)) >= len(c) // 2 for c in named.values()]).repeat_interleave(length)
    x_Td = torch.randn(len(second_T), tiny.D, generator=torch.Generator().manual_seed(0))
    x_Td[fitters[0].target_T, 0] += 2.0
    for fitter, moved_T in zip(fitters, (torch.zeros_like(second_T), second_T, ~second_T), strict=True):
        fitter.fit(0, torch.where(moved_T[:, None], x_Td.flip(1) + 1.0, x_Td))
    whole, other_second, other_first = (
        torch.nn.functional.normalize(a.layer(0).gate.detach(), dim=0) for a in adapters
    )
    assert torch.allclose(whole, other_second, atol=1e-6)
    assert float(whole @ other_first) < 0.9


def test_ffns_read_some_windows_at_a_time_and_gates_are_the_same(monkeypatch):
    named, made, most = plain_texts(classes()), [], []
    for at_once in (7, 10_000):
        monkeypatch.setattr(module, "_WINDOWS_AT_ONCE", at_once)
        model, counts = tiny.model(), []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda _, args, counts=counts: counts.append(len(args[0])))
        attached = Attached(model, [AdapterModule.fresh([16] * tiny.LAYERS, tiny.D, carry=0.5, seed=0)])
        made.append(fit_gates(model, attached, named, Gate()).gates)
        most.append(max(counts))
        assert [name for name, _ in model.named_modules() if name.endswith("ffn.ffn")] == []
    assert most[0] == 7
    assert most[1] == sum(len(text.windows) for text in named.values())
    assert all(torch.allclose(made[0][name], made[1][name], rtol=1e-3, atol=1e-4) for name in made[0])


def test_a_layer_without_a_block_gets_no_gate():
    model = tiny.model()
    adapter = AdapterModule.fresh([16, 0, 16], tiny.D, carry=0.5, seed=0)
    fitted = fit_gates(model, Attached(model, [adapter]), plain_texts(classes()), Gate())
    assert list(fitted.report) == [0, 2]
    assert set(fitted.gates) == {f"layers.{i}.{name}" for i in (0, 2) for name in ("gate", "bias")}


def test_layers_that_find_too_little_get_no_block():
    model = tiny.model()
    adapter = AdapterModule.fresh([16] * tiny.LAYERS, tiny.D, carry=0.5, seed=0)
    attached = Attached(model, [adapter])
    report = fit_gates(model, attached, plain_texts(classes()), Gate(min_found=0.999)).report
    kept = [i for i in range(tiny.LAYERS) if adapter.layer(i) is not None]
    assert kept == [i for i in range(tiny.LAYERS) if report[i].found >= 0.999]
    assert len(kept) < tiny.LAYERS
    assert [b is not None for b in adapter.export(torch.float32)] == [i in kept for i in range(tiny.LAYERS)]


def test_classes_weigh_the_same_however_much_text_they_have_and_their_tokens_by_evidence():
    named = classes()
    named["en"] = named["en"].take(slice(8))
    for carry in (0.0, 0.7):
        fitter = Fitter(
            AdapterModule.fresh([16], 4, carry, 0), plain_texts(named), "target", Gate(target_weight=0.5)
        )
        weight = fitter._weights(fitter.fits_T)[fitter.fits_T]
        of = fitter.class_T[fitter.fits_T]
        assert [float(weight[of == i].sum()) for i in range(3)] == pytest.approx([0.5, 0.25, 0.25])
        e = evidence(fitter.offset_NT.flatten()[fitter.fits_T], carry).double()
        for i in range(3):
            assert torch.allclose(weight[of == i] * e[of == i].sum(), e[of == i] * weight[of == i].sum())


def test_tokens_that_lead_into_the_target_take_no_part_but_in_the_carry():
    """Two fits that differ in what led into the target alone: equal without a carry, different with one."""
    named = classes()
    text = plain_texts(named) | {"target": led_into(named["target"], {"en": named["en"]}, Frames())}
    for carry, same in ((0.0, True), (0.5, False)):
        directions = []
        for lead in (0.0, 5.0):
            adapter = AdapterModule.fresh([16], tiny.D, carry, seed=0)
            fitter = Fitter(adapter, text, "target", Gate())
            x_Td = torch.randn(len(fitter.class_T), tiny.D, generator=torch.Generator().manual_seed(0))
            x_Td[fitter.target_T, 0] += 1.0
            leads_T = (torch.cat([each.own_NT for each in text.values()]) == 0).flatten()
            x_Td[leads_T & fitter.target_T, 1] += lead
            fitter.fit(0, x_Td)
            directions.append(adapter.layer(0).gate.detach().clone())
        assert torch.equal(*directions) == same


@pytest.mark.parametrize("init", list(SOLVERS))
def test_gates_open_after_other_text_too_if_the_fit_read_such_text(init):
    """A stream that tells the target by one feature in whole texts, and by another after original text."""
    named = classes(length=32)
    led = led_into(named["target"], {"en": named["en"]}, Frames())
    own_T, after_T = led.own_NT.flatten(), torch.zeros(led.own_NT.numel(), dtype=torch.bool)
    after_T.view_as(led.own_NT)[1::2] = True
    found = {}
    for name, target in {"whole": GateText.whole(named["target"]), "led into": led}.items():
        adapter = AdapterModule.fresh([16], tiny.D, carry=0.5, seed=0)
        fitter = Fitter(adapter, plain_texts(named) | {"target": target}, "target", Gate(init=init))
        x_Td = torch.randn(len(fitter.class_T), tiny.D, generator=torch.Generator().manual_seed(0))
        stream_Td = x_Td[: len(own_T)].clone()  # of the text that is led into
        stream_Td[after_T & (own_T > 0), 1] += 6.0
        stream_Td[~after_T, 0] += 6.0
        whole_Td = x_Td[: len(own_T)].clone()
        whole_Td[:, 0] += 6.0
        x_Td[: len(own_T)] = stream_Td if name == "led into" else whole_Td
        fitter.fit(0, x_Td)
        m_T = adapter.layer(0).carried(stream_Td, led.windows.offset_NT.flatten(), 0.5)
        found[name] = float((m_T > 0)[after_T & (own_T > 3)].float().mean())
    assert found["whole"] < 0.2
    assert found["led into"] > 0.9
