"""Block gates by kind: from the carried logit m to the gate g.

relu is the paper's gate. relu and relu1 can be exactly 0, so they can be served; the others are the alternatives
that arXiv 2410.02744, section 4, compares.
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


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": block_gate,
    "relu1": relu1,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""The gates by the recipe's name. elu, in the paper's first version, is m where m > 0 and exp(m) - 1 elsewhere;
sigmoid is 1 / (1 + exp(-m)).

With the cross-entropy local loss, sigmoid is a domain classifier. `none` is relu with w = 0 and b = 1: always 1.
"""
