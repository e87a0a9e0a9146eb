"""The carry over many sequences at once: `math.carry` in log2(T) passes instead of T.

Shape suffixes: T tokens of all sequences laid end to end, A gates.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segmented_carry(z_TA: Tensor, a_A: Tensor, offset_T: Tensor, state_TA: Tensor | None = None) -> Tensor:
    """Carried logits m, [T, A], float32 and differentiable in z.

    `a_A` is the carry of each gate. `offset_T` counts a token's place in its sequence's piece (0 starts one);
    `state_TA` holds, in the rows where the offset is 0, the m the piece continues from, NaN where nothing came
    before (None: nowhere). Same recurrence as `math.carry`, solved by doubling: after the pass with shift k,
    row t holds the weighted sum of its last 2k logits (Hillis and Steele, 1986).
    """
    longest = int(offset_T.max()) + 1 if offset_T.numel() else 0
    first_T1 = (offset_T == 0)[:, None]
    m_TA = torch.where(first_T1, _first(z_TA, a_A, state_TA), (1 - a_A) * z_TA)
    shift, power_A = 1, a_A
    # Once a^shift is below float32's resolution, further terms cannot change the sum.
    while shift < longest and bool((power_A > 1e-9).any()):
        reaches = (offset_T[shift:] >= shift)[:, None]
        added = torch.where(reaches, power_A * m_TA[:-shift], 0.0)
        m_TA = torch.cat((m_TA[:shift], m_TA[shift:] + added))
        shift, power_A = shift * 2, power_A * power_A
    return m_TA


def _first(z_TA: Tensor, a_A: Tensor, state_TA: Tensor | None) -> Tensor:
    """m of a piece's first token, computed in every row (the caller keeps the rows it needs)."""
    if state_TA is None:
        return z_TA
    return torch.where(state_TA.isnan(), z_TA, a_A * state_TA.nan_to_num() + (1 - a_A) * z_TA)
