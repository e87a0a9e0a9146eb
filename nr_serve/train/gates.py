"""Fitted gates: each layer's gate tells the target's tokens from every other class, by a convex problem.

The carry is linear, so a token's carried logit is m_t = e_t (w · u_t + b). u is the causal mean of the inputs,
without the first, and e_t = 1 - a^t is the weight of the evidence so far (the bias correction of Adam, arXiv
1412.6980, section 3). So a gate can be fitted on u as if there were no carry. All layers are fitted in one forward
pass, first to last: each layer sees the stream that the already fitted layers below produce.

Shape suffixes: N windows, T tokens (all windows laid end to end), d stream width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nr_serve.logs import bar_interval
from nr_serve.neutral.host import decoder_layers
from nr_serve.train.attach import Attached
from nr_serve.train.blocks import AdapterModule, BlockModule
from nr_serve.train.measure import evaluating
from nr_serve.train.recipe import BadRecipe, Gate
from nr_serve.train.solvers import SOLVERS
from nr_serve.train.text.classes import CHAT, Classes
from nr_serve.train.text.lead_in import GateText, led_into
from nr_serve.train.text.pack import join

_WINDOWS_AT_ONCE = 32


@dataclass(frozen=True)
class LayerFit:
    """How well one layer's gate separates the classes at threshold 0, on the windows that calibrated it."""

    found: float
    """Share of the target's tokens on which the gate would fire, just after other text too."""
    misfired: Mapping[str, float]
    """For each other class, the share of its tokens on which the gate would fire."""


@dataclass(frozen=True)
class FittedGates:
    """An adapter's fitted gates."""

    gates: Mapping[str, Tensor]
    """`AdapterModule.gates` of the layers that have a block."""
    report: Mapping[int, LayerFit]
    """How well each layer's gate fits, including layers whose block was dropped."""

    def summary(self) -> str:
        """The report in one line, for people."""
        found = fmean(fit.found for fit in self.report.values())
        worst = max(max(fit.misfired.values()) for fit in self.report.values())
        finds = f"gates find {found:.1%} of the target, misfire on at most {worst:.2%} of a class in a layer"
        return f"{finds}, at threshold 0"


def evidence(offset_NT: Tensor, a: float) -> Tensor:
    """e_t = 1 - a^t, [N, T]: weight in the carried logit of the tokens read so far, from 0 up to 1."""
    return 1 - a ** offset_NT.float()


def causal_mean(x_NTd: Tensor, offset_NT: Tensor, a: float) -> Tensor:
    """u_t = sum over 1 <= i <= t of (1 - a) a^(t-i) x_i / e_t along each window; u_0 = x_0; [N, T, d].

    A text begins where the offset is 0. Computed in one pass: u_t = u_(t-1) + (1 - a) / e_t (x_t - u_(t-1)).
    """
    if a == 0:
        return x_NTd
    u_NTd = x_NTd.clone()
    step_NT1 = ((1 - a) / evidence(offset_NT, a)).clamp(max=1)[..., None]  # 1 where the offset is 0 or 1
    for t in range(1, x_NTd.shape[1]):
        u_NTd[:, t] = torch.lerp(u_NTd[:, t - 1], x_NTd[:, t], step_NT1[:, t])
    return u_NTd


class Fitter:
    """Fits the gates of one adapter while a forward pass over all classes runs.

    The first half of a class's windows fits the gates, the second half calibrates them: a threshold set on the
    fitted text would be too low. In the fit a token is weighted by the evidence of its class: the part of its carry
    that is from the class's own tokens. The calibration uses carried logits as in serving. Tokens that lead into a
    class's own text take no part.

    Once a trained block of a lower layer acts on tokens of other classes, those tokens are left out: the block has
    moved them among the target's tokens, so a gate that stays shut on them would have to stay shut on the target.
    """

    def __init__(
        self,
        adapter: AdapterModule,
        classes: Mapping[str, GateText],
        target: str,
        gate: Gate,
        original: Collection[str] = (),
    ) -> None:
        self.adapter, self.target, self.gate, self.original = adapter, target, gate, original
        device = next(adapter.parameters()).device
        self.windows = join(text.windows for text in classes.values()).to(device)
        self.offset_NT = self.windows.offset_NT
        self.names = list(classes)
        length, counts = self.offset_NT.shape[1], [len(text.windows) for text in classes.values()]
        per_window = torch.cat([torch.full((count,), i, device=device) for i, count in enumerate(counts)])
        # Not every other window, which is often of the same document as the one before.
        fits = torch.cat([torch.arange(count, device=device) < (count + 1) // 2 for count in counts])
        self.class_T = per_window.repeat_interleave(length)
        self.evidence_T = evidence(self.offset_NT, adapter.carry).flatten()
        own_NT = torch.cat([text.own_NT for text in classes.values()]).to(device)
        self.own_evidence_T = evidence(own_NT, adapter.carry).flatten()
        told_T = self.own_evidence_T > 0
        self.fits_T = told_T & fits.repeat_interleave(length)
        self.checks_T = told_T & ~fits.repeat_interleave(length)
        self.target_T = self.class_T == self.names.index(self.target)
        self.moved_T = torch.zeros_like(self.target_T)
        self.report: dict[int, LayerFit] = {}

    def fit(self, layer: int, x_Td: Tensor) -> None:
        """Fit, calibrate and scale the layer's gate; drop the block if the gate finds too little of the target."""
        module = self.adapter.layer(layer)
        if module is None:
            return
        if not bool(x_Td.isfinite().all()):
            raise BadRecipe(f"what layer {layer}'s FFN reads is not finite: the base, or an adapter, gives NaN")
        u_Td = self._causal_mean(x_Td)
        fits_T = self.fits_T & ~self.moved_T
        weight_T = self._weights(fits_T)[fits_T]
        solve = SOLVERS[self.gate.init]
        w_d, b = solve(u_Td[fits_T], self.target_T[fits_T].double(), weight_T, self.gate.ridge)
        _set(module, w_d, b)
        self._calibrate(layer, module, u_Td)
        if self.report[layer].found < self.gate.min_found:
            self.adapter.drop(layer)
        elif bool(module.w_out.any()):
            m_T = self.evidence_T * (u_Td @ module.gate.detach() + module.bias.detach())
            self.moved_T |= (m_T > self.adapter.threshold) & ~self.target_T

    def _causal_mean(self, x_Td: Tensor) -> Tensor:
        x_NTd = x_Td.float().view(*self.offset_NT.shape, -1)
        return causal_mean(x_NTd, self.offset_NT, self.adapter.carry).flatten(0, 1)

    def _weights(self, fits_T: Tensor) -> Tensor:
        """Weight of each token: `gate.target_weight` for the target, the rest shared equally by other classes.

        Classes of which no token is left take no share.
        """
        weight_T = self.own_evidence_T.double()
        counts = torch.bincount(self.class_T[fits_T], weight_T[fits_T], minlength=len(self.names))
        others = int((counts > 0).sum()) - 1
        share = torch.full_like(counts, (1 - self.gate.target_weight) / max(1, others))
        share[self.names.index(self.target)] = self.gate.target_weight
        return (share / counts)[self.class_T] * weight_T

    def _percentile(self, name: str) -> float:
        return self.gate.percentile if name in self.original else self.gate.background_percentile

    def _calibrate(self, layer: int, module: BlockModule, u_Td: Tensor) -> None:
        class_T, moved_T = self.class_T[self.checks_T], self.moved_T[self.checks_T]
        logit_T = (u_Td[self.checks_T] @ module.gate.detach() + module.bias.detach()).double()
        left = {
            name: logit_T[(class_T == i) & ~moved_T] for i, name in enumerate(self.names) if name != self.target
        }
        highest = (float(z.quantile(self._percentile(name) / 100)) for name, z in left.items() if len(z))
        shift = max(highest, default=0.0)
        m_T = self.evidence_T[self.checks_T] * (logit_T - shift)
        by_class = {name: m_T[class_T == i] for i, name in enumerate(self.names)}
        target_m = by_class.pop(self.target)
        open_m = target_m[target_m > 0]
        scale = self.gate.resolved.steepness / float(open_m.mean()) if len(open_m) else 1.0
        _set(module, module.gate.detach().double() * scale, (module.bias.detach().double() - shift) * scale)
        misfired = {name: float((m > 0).double().mean()) for name, m in by_class.items()}
        self.report[layer] = LayerFit(len(open_m) / len(target_m), misfired)


def _set(module: BlockModule, w_d: Tensor, b: Tensor) -> None:
    with torch.no_grad():
        module.gate.copy_(w_d)
        module.bias.copy_(b)


def gate_classes(classes: Classes, tokens: int, contested: Collection[str] = ()) -> dict[str, GateText]:
    """About `tokens` tokens of every class, but four times as many of the target, which faces all the others.

    Background classes in `contested`, on which other adapters act, also get four times as many.

    Half of the windows of the target and of background classes are led into by original text, or by a chat (see
    `lead_in`): on the target a gate must open there too, and on other text it must stay shut.
    """
    count = max(2, tokens // classes.target.ids_NT.shape[1])
    original = {name: windows.spread(count) for name, windows in classes.original.items()}
    pages = {name: windows for name, windows in original.items() if name != CHAT}
    spread = {"target": classes.target.spread(4 * count)}
    spread |= {
        name: windows.spread(4 * count if name in contested else count)
        for name, windows in classes.background.items()
    }
    led = {name: led_into(windows, pages, classes.frames) for name, windows in spread.items()}
    return led | {name: GateText.whole(windows) for name, windows in original.items()}


def refit_gates(
    model: Any, attached: Attached, classes: Classes, gate: Gate, contested: Collection[str] = ()
) -> FittedGates:
    """Fit the gates of the first attached adapter, which is trained, on the stream that its blocks produce.

    No block is dropped, because all are trained. `contested` is that of `gate_classes`.
    """
    gate = gate.model_copy(update={"min_found": 0.0})
    read = gate_classes(classes, gate.fit_tokens, contested)
    return fit_gates(model, attached, read, gate, original=classes.original)


class _InSlices(nn.Module):
    """An FFN that reads some windows at a time: what it computes within is several times as wide as the stream."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x_NTd: Tensor) -> Tensor:
        return torch.cat([self.ffn(part) for part in torch.split(x_NTd, _WINDOWS_AT_ONCE)])


@contextmanager
def _ffns_in_slices(model: Any) -> Iterator[None]:
    hosts: list[Any] = [layer.mlp for layer in decoder_layers(model)]
    for host in hosts:
        host.ffn = _InSlices(host.ffn)
    try:
        yield
    finally:
        for host in hosts:
            host.ffn = host.ffn.ffn


def fit_gates(
    model: Any,
    attached: Attached,
    classes: Mapping[str, GateText],
    gate: Gate,
    *,
    original: Collection[str] = (),
) -> FittedGates:
    """Fit the gates of the first attached adapter in one forward pass; return them with how well they fit.

    The stream includes the residues of that adapter, through the gates fitted so far, and of the other attached
    adapters. `original` names the classes that `percentile` applies to, not `background_percentile`. The stream of
    all classes' tokens is in memory at once.
    """
    fitter = Fitter(attached.adapters[0], classes, "target", gate, original)
    windows, depth = fitter.windows, attached.adapters[0].depth
    bar = tqdm(total=depth, desc="gates", unit=" layers", leave=False, mininterval=bar_interval())
    with evaluating(model), _ffns_in_slices(model), bar:

        def fit(layer: int, x_Td: Tensor) -> None:
            fitter.fit(layer, x_Td)
            bar.update()

        attached.before = fit
        try:
            attached.begin(windows.offset_NT)
            model.model(windows.ids_NT, use_cache=False, position_ids=windows.offset_NT)
        finally:
            attached.before = None
    return FittedGates(attached.adapters[0].gates(), fitter.report)
