"""The losses of training, summed over tokens. Each is a small function with its formula.

Shape suffixes: B windows, T tokens (in a local loss: all windows laid end to end), V vocabulary, d stream width,
f tokens that fired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_labels(ids_BT: Tensor, offset_BT: Tensor) -> Tensor:
    """For each token, the next token in its document, [B, T]; -100 at the end of a document or window."""
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, :-1] = torch.where(offset_BT[:, 1:] == 0, -100, ids_BT[:, 1:])
    return labels_BT


def token_nats(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """-log p(label) of each token, in nats, float32 [B, T]; 0 where there is no label."""
    logits_MV = logits_BTV.flatten(0, 1).float()
    nats_M = F.cross_entropy(logits_MV, labels_BT.flatten(), ignore_index=-100, reduction="none")
    return nats_M.view_as(labels_BT)


def lm_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum over labelled tokens of -log p(label), in nats; float32."""
    return token_nats(logits_BTV, labels_BT).sum()


@dataclass(frozen=True)
class LayerOutput:
    """What one layer's block did on a pass's tokens; the input of a local loss."""

    m_T: Tensor
    """Carried logits, float32."""
    target_T: Tensor
    """Which tokens are target text, bool."""
    r_fd: Tensor
    """Residues of the tokens that fired and are not target text."""
    ffn_fd: Tensor
    """The FFN's own output on those tokens, without gradient."""


def l1(layer: LayerOutput) -> Tensor:
    """Sum over fired tokens of ||r||_1 / d, where r = g * block(x) is the residue.

    Divided by the numbers of tokens and layers, this is the local loss of arXiv 2410.02744, section 3; tokens that
    did not fire add 0.
    """
    return layer.r_fd.float().abs().sum() / layer.r_fd.shape[-1]


def l1_relative(layer: LayerOutput) -> Tensor:
    """Sum over fired tokens of ||r||_1 / ||FFN(x)||_1: like `l1`, but independent of the stream's scale."""
    norm_f = layer.ffn_fd.float().abs().sum(-1)
    tiny = torch.finfo(torch.float32).tiny
    return (layer.r_fd.float().abs().sum(-1) / norm_f.clamp_min(tiny)).sum()


def cross_entropy(layer: LayerOutput) -> Tensor:
    """Sum over tokens of CE(sigmoid(m), token is target text): a domain classifier in every layer.

    The alternative to ReLU and l1 in arXiv 2410.02744, section 4.
    """
    return F.binary_cross_entropy_with_logits(layer.m_T, layer.target_T.float(), reduction="sum")


def open_hinge(over_T: Tensor, target_T: Tensor) -> Tensor:
    """Sum over target tokens of relu(1 - over), where over is m less the threshold; 0 where relu1 is fully open.

    Unlike a local loss, its gradient flows back through the stream, to the blocks below.
    """
    return torch.relu(1 - over_T[target_T]).sum()


LocalLoss = Callable[[LayerOutput], Tensor]
"""(one layer's output) -> its summed local loss, a scalar."""

LOCAL: dict[str, LocalLoss] = {"l1": l1, "l1-relative": l1_relative, "cross-entropy": cross_entropy}
"""The local losses, by the recipe's names for them."""
