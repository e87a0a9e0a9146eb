"""Closed-form gates: each layer's gate fitted to tell the target's tokens from every other class, by least squares.

The carry is linear, so the carried logit of a token is w · u + b with u the causal mean of its inputs
(u_t = a u_(t-1) + (1 - a) x_t, u_0 = x_0): a gate can be fitted on u as if it were not carried. Layers are fitted
in one forward pass, first to last: each sees the stream as the gates below it, already fitted, leave it.

Shape suffixes: N windows, T tokens (of all windows laid end to end), d width of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nr_serve.train.attach import AdapterModule, Attached, BlockModule, window_inputs
from nr_serve.train.recipe import Gate
from nr_serve.train.text import Classes, Windows, join

CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class LayerFit:
    """How well one layer's gate tells the classes apart, on the windows that calibrated it."""

    found: float
    """Share of the target's tokens that fire."""
    misfired: Mapping[str, float]
    """Share of each other class's tokens that fire."""


def solve_ridge(u_Td: Tensor, y_T: Tensor, weight_T: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """w [d] and b [] that minimise sum_t weight_t (w · u_t + b - y_t)^2 + ridge v |w|^2, in float64.

    v is the mean weighted variance of a feature (weights sum to 1). The bias is not penalised. With two values
    of y this is Fisher's linear discriminant with shrinkage.
    """
    d = u_Td.shape[1]
    total = weight_T.double().sum()
    moment_dd = torch.zeros(d, d, dtype=torch.float64)
    cross_d = torch.zeros(d, dtype=torch.float64)
    mean_d = torch.zeros(d, dtype=torch.float64)
    for u, y, weight in zip(*(torch.split(t, CHUNK_TOKENS) for t in (u_Td, y_T, weight_T)), strict=True):
        u, weight = u.double(), weight.double() / total
        weighted = u * weight[:, None]
        moment_dd += weighted.T @ u
        cross_d += weighted.T @ y.double()
        mean_d += weighted.sum(0)
    mean_y = (y_T.double() * weight_T.double()).sum() / total
    covariance_dd = moment_dd - torch.outer(mean_d, mean_d)
    penalty = ridge * covariance_dd.diagonal().mean()
    w_d = torch.linalg.solve(covariance_dd + penalty * torch.eye(d), cross_d - mean_d * mean_y)
    return w_d, mean_y - w_d @ mean_d


def causal_mean(x_NTd: Tensor, offset_NT: Tensor, a: float) -> Tensor:
    """u_t = a u_(t-1) + (1 - a) x_t along each window, anew where the offset is 0; [N, T, d]."""
    if a == 0:
        return x_NTd
    u_NTd = torch.empty_like(x_NTd)
    u_NTd[:, 0] = x_NTd[:, 0]
    for t in range(1, x_NTd.shape[1]):
        moved_Nd = torch.lerp(x_NTd[:, t], u_NTd[:, t - 1], a)
        u_NTd[:, t] = torch.where(offset_NT[:, t, None] == 0, x_NTd[:, t], moved_Nd)
    return u_NTd


class Fitter:
    """Fits or only recalibrates the gates of one adapter while a forward pass over all classes runs.

    Even windows of a class fit, odd ones calibrate: a threshold set on the text of the fit would be too low.
    """

    def __init__(self, adapter: AdapterModule, classes: Mapping[str, Windows], target: str, gate: Gate) -> None:
        self.adapter, self.target, self.gate = adapter, target, gate
        windows = join(classes.values())
        self.offset_NT = windows.offset_NT
        self.names = list(classes)
        per_window = torch.cat([torch.full((len(c),), i) for i, c in enumerate(classes.values())])
        fits = torch.cat([torch.arange(len(c)) % 2 == 0 for c in classes.values()])
        length = windows.ids_NT.shape[1]
        self.class_T = per_window.repeat_interleave(length)
        self.fits_T = fits.repeat_interleave(length)
        self.report: dict[int, LayerFit] = {}

    def fit(self, layer: int, x_Td: Tensor) -> None:
        """Fit, calibrate and scale the layer's gate; drop the block if it finds too little of the target."""
        module = self.adapter.layer(layer)
        if module is None:
            return
        u_Td = self._carried(x_Td)
        target_T = self.class_T == self.names.index(self.target)
        weight_T = self._weights(target_T)[self.fits_T]
        w_d, b = solve_ridge(u_Td[self.fits_T], target_T[self.fits_T].double(), weight_T, self.gate.ridge)
        _set(module, w_d, b)
        self._calibrate(layer, module, u_Td, rescale=True)
        if self.report[layer].found < self.gate.min_found:
            self.adapter.drop(layer)

    def recalibrate(self, layer: int, x_Td: Tensor) -> None:
        """Move only the layer's bias, so that the percentile holds on the stream as it is now."""
        module = self.adapter.layer(layer)
        if module is not None:
            self._calibrate(layer, module, self._carried(x_Td), rescale=False)

    def _carried(self, x_Td: Tensor) -> Tensor:
        return causal_mean(
            x_Td.float().view(*self.offset_NT.shape, -1), self.offset_NT, self.adapter.carry
        ).flatten(0, 1)

    def _weights(self, target_T: Tensor) -> Tensor:
        """Half of the weight to the target, the other half in equal parts to the other classes."""
        counts = torch.bincount(self.class_T[self.fits_T], minlength=len(self.names)).double()
        per_class = 0.5 / (len(self.names) - 1) / counts
        per_class[self.names.index(self.target)] *= len(self.names) - 1
        return per_class[self.class_T]

    def _calibrate(self, layer: int, module: BlockModule, u_Td: Tensor, *, rescale: bool) -> None:
        checks_T = ~self.fits_T
        m_T = (u_Td @ module.gate.detach() + module.bias.detach())[checks_T].double()
        by_class = {name: m_T[self.class_T[checks_T] == i] for i, name in enumerate(self.names)}
        target_m = by_class.pop(self.target)
        q = self.gate.percentile / 100
        threshold = max(float(m.quantile(q)) for m in by_class.values())
        open_m = target_m[target_m > threshold] - threshold
        scale = 1 / float(open_m.mean()) if rescale and len(open_m) else 1.0
        _set(module, module.gate.detach().double() * scale, (module.bias.detach().double() - threshold) * scale)
        misfired = {name: float((m > threshold).double().mean()) for name, m in by_class.items()}
        self.report[layer] = LayerFit(len(open_m) / len(target_m), misfired)


def _set(module: BlockModule, w_d: Tensor, b: Tensor) -> None:
    with torch.no_grad():
        module.gate.copy_(w_d)
        module.bias.copy_(b)


def gate_classes(classes: Classes, tokens: int) -> dict[str, Windows]:
    """About `tokens` tokens of every class, and four times that of the target, whose weight is half of the fit."""
    count = max(2, tokens // classes.target.ids_NT.shape[1])
    others = dict(classes.original) | dict(classes.background)
    fitted = {name: windows.take(slice(count)) for name, windows in others.items()}
    return {"target": classes.target.take(slice(4 * count))} | fitted


@torch.no_grad()
def fit_gates(
    model: Any, attached: Attached, classes: Mapping[str, Windows], gate: Gate, *, only_bias: bool = False
) -> dict[int, LayerFit]:
    """Fit the gates of the one attached adapter in a single forward pass; returns how well, by layer.

    With `only_bias` the gates keep their direction and scale and only the thresholds are set anew, which is
    safe after training: the blocks have learned beside those gates. Memory: all classes' tokens at once.
    """
    fitter = Fitter(attached.adapters[0], classes, "target", gate)
    windows = join(classes.values())
    attached.before = fitter.recalibrate if only_bias else fitter.fit
    try:
        attached.begin(windows.offset_NT)
        model.model(windows.ids_NT, use_cache=False, **window_inputs(windows.offset_NT))
    finally:
        attached.before = None
    return fitter.report
