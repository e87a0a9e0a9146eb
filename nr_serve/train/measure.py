"""Loss and fired shares of attached adapters on windows of text, through the same hosted blocks that train.

Shape suffixes: N windows, T tokens a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nr_serve.train.attach import Attached, window_inputs
from nr_serve.train.losses import next_token_labels
from nr_serve.train.pack import Windows

BATCH_WINDOWS = 8


@dataclass(frozen=True)
class SourceResult:
    """One source of text, with every attached adapter in place."""

    loss: float
    """Mean held-out loss, nats a token."""
    tokens: int
    """Tokens read."""
    fired: tuple[float, ...]
    """Share of token-layers that fired, by adapter."""
    fired_by_layer: tuple[tuple[float | None, ...], ...]
    """Share of tokens that fired, by adapter and layer; None for a layer without a block."""
    nats_N: tuple[float, ...]
    """Summed loss of each window, in nats."""
    labels_N: tuple[int, ...]
    """Tokens predicted in each window."""


@torch.no_grad()
def measure(model: Any, attached: Attached, sources: Mapping[str, Windows]) -> dict[str, SourceResult]:
    """Loss and fired shares of every source as the attached adapters are now, without dropout."""
    training = model.training
    model.eval()
    try:
        return {name: _measure_one(model, attached, windows) for name, windows in sources.items()}
    finally:
        model.train(training)


def _measure_one(model: Any, attached: Attached, windows: Windows) -> SourceResult:
    nats: list[float] = []
    labelled: list[int] = []
    fired = [[0] * adapter.depth for adapter in attached.adapters]
    for at in range(0, len(windows), BATCH_WINDOWS):
        part = windows.take(slice(at, at + BATCH_WINDOWS)).to(model.device)
        record = attached.begin(part.offset_NT)
        logits_NTV = model(part.ids_NT, use_cache=False, **window_inputs(part.offset_NT)).logits
        labels_NT = next_token_labels(part.ids_NT, part.offset_NT)
        nats += _summed_loss(logits_NTV, labels_NT).tolist()
        labelled += (labels_NT != -100).sum(1).tolist()
        fired = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(fired, record.fired, strict=True)]
    tokens = windows.ids_NT.numel()
    by_layer = tuple(
        tuple(count / tokens if adapter.layer(i) is not None else None for i, count in enumerate(counts))
        for adapter, counts in zip(attached.adapters, fired, strict=True)
    )
    shares = tuple(_mean(layers) for layers in by_layer)
    return SourceResult(sum(nats) / sum(labelled), tokens, shares, by_layer, tuple(nats), tuple(labelled))


def _summed_loss(logits_NTV: Tensor, labels_NT: Tensor) -> Tensor:
    """Sum over each window's labelled tokens of -log p(label), in nats, [N], float64."""
    nats_M = F.cross_entropy(
        logits_NTV.flatten(0, 1).float(), labels_NT.flatten(), ignore_index=-100, reduction="none"
    )
    return nats_M.view_as(labels_NT).double().sum(1)


def _mean(layers: tuple[float | None, ...]) -> float:
    shares = [share for share in layers if share is not None]
    return sum(shares) / len(shares)
