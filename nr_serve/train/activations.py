"""Block gates by kind: from the carried logit m to the gate g.

relu is the paper's. It and relu1 can be exactly 0, so they are served; the others are the alternatives of
arXiv 2410.02744, section 4, to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nr_serve.neutral.format import CEILINGS
from nr_serve.neutral.math import block_gate


def relu1(m_T: Tensor) -> Tensor:
    """g = min(relu(m), 1)."""
    return block_gate(m_T, ceiling=CEILINGS["relu1"])


def elu(m_T: Tensor) -> Tensor:
    """g = m where m > 0, exp(m) - 1 elsewhere (the gate of the paper's first version)."""
    return F.elu(m_T)


def sigmoid(m_T: Tensor) -> Tensor:
    """g = 1 / (1 + exp(-m)); with the cross-entropy local loss it is a domain classifier."""
    return torch.sigmoid(m_T)


def tanh(m_T: Tensor) -> Tensor:
    """g = tanh(m)."""
    return torch.tanh(m_T)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": block_gate,
    "relu1": relu1,
    "elu": elu,
    "sigmoid": sigmoid,
    "tanh": tanh,
}
"""The gates by the recipe's name. `none` is relu with w = 0 and b = 1: always 1."""
