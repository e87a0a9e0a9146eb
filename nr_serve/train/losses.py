"""The losses of training, summed over tokens. Each is a small function with its formula.

Shape suffixes: B windows, T tokens (of all windows laid end to end in a local loss), V vocabulary, d width of
the stream, f fired tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_labels(ids_BT: Tensor, offset_BT: Tensor) -> Tensor:
    """For each token the one after it in its document, [B, T]; -100 at a document's or window's end."""
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, :-1] = torch.where(offset_BT[:, 1:] == 0, -100, ids_BT[:, 1:])
    return labels_BT


def token_nats(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """-log p(label) of each token, in nats; 0 where there is no label; float32 [B, T]."""
    logits_MV = logits_BTV.flatten(0, 1).float()
    nats_M = F.cross_entropy(logits_MV, labels_BT.flatten(), ignore_index=-100, reduction="none")
    return nats_M.view_as(labels_BT)


def lm_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum over labelled tokens of -log p(label), in nats; float32."""
    return token_nats(logits_BTV, labels_BT).sum()


@dataclass(frozen=True)
class LayerOutput:
    """What one layer's block did with the tokens of a pass: what a local loss may read."""

    m_T: Tensor
    """Carried logits, float32."""
    target_T: Tensor
    """Which tokens are of the target, bool."""
    r_fd: Tensor
    """Residues of the fired tokens that are not of the target."""
    ffn_fd: Tensor
    """The FFN's own output on the same tokens, without gradient."""


def l1(layer: LayerOutput) -> Tensor:
    """Sum over fired tokens of ||r||_1 / d, where r = g * block(x) is the residue.

    Divided by tokens and layers it is the local loss of arXiv 2410.02744, section 3: tokens that did not fire
    add 0.
    """
    return layer.r_fd.float().abs().sum() / layer.r_fd.shape[-1]


def l1_relative(layer: LayerOutput) -> Tensor:
    """Sum over fired tokens of ||r||_1 / ||FFN(x)||_1: `l1` free of the scale of the base's stream."""
    norm_f = layer.ffn_fd.float().abs().sum(-1)
    tiny = torch.finfo(torch.float32).tiny
    return (layer.r_fd.float().abs().sum(-1) / norm_f.clamp_min(tiny)).sum()


def cross_entropy(layer: LayerOutput) -> Tensor:
    """Sum over tokens of CE(sigmoid(m), token is of the target): a domain classifier in every layer.

    The alternative to ReLU and l1 in arXiv 2410.02744, section 4.
    """
    return F.binary_cross_entropy_with_logits(layer.m_T, layer.target_T.float(), reduction="sum")


def open_hinge(over_T: Tensor, target_T: Tensor) -> Tensor:
    """Sum over tokens of the target of relu(1 - over), of m less the threshold: 0 where a ceiling of 1 is reached.

    Unlike a local loss its gradient runs down the stream, to the blocks below that moved it.
    """
    return torch.relu(1 - over_T[target_T]).sum()


LocalLoss = Callable[[LayerOutput], Tensor]
"""One layer's summed local loss, a scalar."""

LOCAL: dict[str, LocalLoss] = {"l1": l1, "l1-relative": l1_relative, "cross-entropy": cross_entropy}
"""The local losses by the recipe's name."""
