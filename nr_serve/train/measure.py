"""Loss and fired shares of attached adapters on windows of text, through the same hosted blocks that train.

Shape suffixes: N windows, T tokens per window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from nr_serve.train.attach import Attached, ForwardPass, OnGates
from nr_serve.train.losses import next_token_labels, token_nats
from nr_serve.train.text.pack import Windows

BATCH_WINDOWS = 8


@dataclass(frozen=True)
class SourceResult:
    """Measurements of one source of text, with the attached adapters."""

    loss: float
    """Mean held-out loss, nats per token."""
    tokens: int
    """Number of tokens read."""
    fired: tuple[float, ...]
    """Share of token-layers that fired, by adapter."""
    fired_by_layer: tuple[tuple[float | None, ...], ...]
    """Share of tokens that fired, by adapter and layer; None for a layer without a block."""
    nats_N: tuple[float, ...]
    """Summed loss of each window, in nats."""
    labels_N: tuple[int, ...]
    """Number of tokens predicted in each window."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradient checkpointing and no gradients in the block."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def measure(model: Any, attached: Attached, sources: Mapping[str, Windows]) -> dict[str, SourceResult]:
    """Loss and fired shares of every source with the currently attached adapters; the text may be on any device."""
    with evaluating(model):
        return {name: _measure_one(model, attached, windows) for name, windows in sources.items()}


def read_parts(
    model: Any, attached: Attached, windows: Windows, on_gates: OnGates | None = None
) -> Iterator[tuple[ForwardPass, Tensor, Tensor]]:
    """For a few windows at a time: the pass's record, next-token losses in nats, and a mask; both [N, T].

    The mask is True for tokens that have a next token; elsewhere the loss is 0. `on_gates` is
    `ForwardPass.on_gates`.
    """
    for at in range(0, len(windows), BATCH_WINDOWS):
        part = windows.take(slice(at, at + BATCH_WINDOWS)).to(model.device)
        record = attached.begin(part.offset_NT)
        record.on_gates = on_gates
        logits_NTV = model(part.ids_NT, use_cache=False, position_ids=part.offset_NT).logits
        labels_NT = next_token_labels(part.ids_NT, part.offset_NT)
        yield record, token_nats(logits_NTV, labels_NT).double(), labels_NT != -100


def _measure_one(model: Any, attached: Attached, windows: Windows) -> SourceResult:
    nats: list[float] = []
    labelled: list[int] = []
    fired = [[0] * adapter.depth for adapter in attached.adapters]
    for record, nats_NT, labelled_NT in read_parts(model, attached, windows):
        nats += nats_NT.sum(1).tolist()
        labelled += labelled_NT.sum(1).tolist()
        fired = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(fired, record.fired, strict=True)]
    tokens = windows.ids_NT.numel()
    by_layer = tuple(
        tuple(count / tokens if adapter.layer(i) is not None else None for i, count in enumerate(counts))
        for adapter, counts in zip(attached.adapters, fired, strict=True)
    )
    shares = tuple(_mean(layers) for layers in by_layer)
    return SourceResult(sum(nats) / sum(labelled), tokens, shares, by_layer, tuple(nats), tuple(labelled))


def _mean(layers: tuple[float | None, ...]) -> float:
    shares = [share for share in layers if share is not None]
    return fmean(shares)
