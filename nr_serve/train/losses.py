"""The losses of training. Each is a small function with its formula.

Shape suffixes: B windows, T tokens, V vocabulary, d width of the stream, f fired tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_labels(ids_BT: Tensor, offset_BT: Tensor) -> Tensor:
    """For each token the one after it in its document, [B, T]; -100 at a document's or window's end."""
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, :-1] = torch.where(offset_BT[:, 1:] == 0, -100, ids_BT[:, 1:])
    return labels_BT


def lm_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean over labelled tokens of -log p(label), in nats; float32."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=-100)


def l1(r_fd: Tensor, ffn_fd: Tensor) -> Tensor:
    """Sum over fired tokens of ||r||_1 / d, where r = g * block(x) is the residue.

    Divided by tokens and layers it is the local loss of arXiv 2410.02744, section 3: tokens that did not fire
    add 0. `ffn_fd` is not read.
    """
    return r_fd.float().abs().sum() / r_fd.shape[-1]


def l1_relative(r_fd: Tensor, ffn_fd: Tensor) -> Tensor:
    """Sum over fired tokens of ||r||_1 / ||FFN(x)||_1: `l1` free of the scale of the base's stream."""
    norm_f = ffn_fd.float().abs().sum(-1)
    tiny = torch.finfo(torch.float32).tiny
    return (r_fd.float().abs().sum(-1) / norm_f.clamp_min(tiny)).sum()


LOCAL = {"l1": l1, "l1-relative": l1_relative}
"""The local losses by the recipe's name."""


def local_loss(summed: Tensor | None, tokens: int, layers: int) -> Tensor:
    """Mean over tokens and layers of the gathered local terms; 0 if nothing fired."""
    return torch.zeros(()) if summed is None else summed / (tokens * layers)
