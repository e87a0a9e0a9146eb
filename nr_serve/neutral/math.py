"""The definition of a neutral residue, in plain torch: every fast path is tested against this file.

For a token's normalised FFN input x, in one layer and for one adapter:

    logit      z_t = w · x_t + b
    carried    m_t = a m_(t-1) + (1 - a) z_t,   m_0 = 0 whatever z_0 is; tokens count from 0
    block gate g_t = min(relu(m_t - threshold), ceiling)
    residue    r_t = g_t W_out(silu(W_gate x_t) * (W_in x_t))

The layer's output is FFN(x) + the sum of r over the selected adapters. g is exactly 0 wherever m is at most the
threshold, so leaving the block out there changes nothing.

Source: "Neutral Residues", arXiv 2410.02744, section 3. The carry (a > 0) and the ceiling are this project's own:
the paper's gate has a = 0 and no ceiling (infinity). A text's first token does not affect the carry and gets no
block: its stream depends on its position, not on the language, and all later tokens attend to it (an attention
sink: Xiao et al., arXiv 2309.17453).
Shape suffixes: T tokens, d width of the residual stream, h width of the block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gate_logit(x_Td: Tensor, w_d: Tensor, b: Tensor) -> Tensor:
    """Logit z of one block's gate, [T], in float32 whatever the stream's dtype."""
    return x_Td.float() @ w_d.float() + b.float()


def carry(z_T: Tensor, a: float, state: float | Tensor = math.nan) -> Tensor:
    """Carried logits m of one sequence, [T], continuing from `state` (scalar; NaN: the sequence starts here).

    The last value is the state to continue from, so splitting a sequence gives the same m as long as it is finite.
    """
    m_T = torch.empty_like(z_T)
    for t, z in enumerate(z_T):
        starts = t == 0 and math.isnan(state)
        m_T[t] = state = torch.zeros_like(z) if starts else a * state + (1 - a) * z
    return m_T


def block_gate(m_T: Tensor, threshold: float | Tensor = 0.0, ceiling: float | Tensor = math.inf) -> Tensor:
    """Block gate g = min(relu(m - threshold), ceiling), [T]. The gate *fires* where g > 0.

    With a ceiling of 1 the block is fully on for most of its own text. There, how far m is above the threshold is
    noise, and without a ceiling the residue would be multiplied by it.
    """
    return torch.relu(m_T - threshold).clamp(max=ceiling)


def block(x_Td: Tensor, w_in_hd: Tensor, w_gate_hd: Tensor, w_out_dh: Tensor) -> Tensor:
    """The block without its gate: W_out(silu(W_gate x) * (W_in x)), [T, d]."""
    return F.linear(F.silu(F.linear(x_Td, w_gate_hd)) * F.linear(x_Td, w_in_hd), w_out_dh)


def residue(x_Td: Tensor, g_T: Tensor, w_in_hd: Tensor, w_gate_hd: Tensor, w_out_dh: Tensor) -> Tensor:
    """The residue that one adapter adds to one layer's FFN output, [T, d]."""
    return g_T[:, None].to(x_Td.dtype) * block(x_Td, w_in_hd, w_gate_hd, w_out_dh)
