"""Loss and fired shares of attached adapters on windows of text, through the same hosted blocks that train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nr_serve.train.attach import Attached, window_inputs
from nr_serve.train.losses import lm_loss, next_token_labels
from nr_serve.train.text import Windows

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


@torch.no_grad()
def measure(model: Any, attached: Attached, sources: Mapping[str, Windows]) -> dict[str, SourceResult]:
    """Loss and fired shares of every source as the attached adapters are now."""
    return {name: _measure_one(model, attached, windows) for name, windows in sources.items()}


def _measure_one(model: Any, attached: Attached, windows: Windows) -> SourceResult:
    total, labelled = 0.0, 0
    fired = [0.0] * len(attached.adapters)
    for at in range(0, len(windows), BATCH_WINDOWS):
        part = windows.take(slice(at, at + BATCH_WINDOWS))
        record = attached.begin(part.offset_NT)
        logits = model(part.ids_NT, use_cache=False, **window_inputs(part.offset_NT)).logits
        labels = next_token_labels(part.ids_NT, part.offset_NT)
        count = int((labels != -100).sum())
        total += float(lm_loss(logits, labels)) * count
        labelled += count
        fired = [f + record.fired_share(i) * len(part) / len(windows) for i, f in enumerate(fired)]
    return SourceResult(total / labelled, windows.ids_NT.numel(), tuple(fired))
