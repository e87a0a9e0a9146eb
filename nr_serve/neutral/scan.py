"""The carry over many sequences at once: `math.carry` in log2(T) passes instead of T.

The recurrence is solved by doubling: after the pass with shift k, row t holds the weighted sum of its last 2k
logits (Hillis and Steele, 1986).
Shape suffixes: T tokens of all sequences laid end to end, P pieces of sequences, A gates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NEGLIGIBLE = 1e-9  # below float32's resolution: terms of less weight do not change the sum


def segmented_carry(z_TA: Tensor, a_A: Tensor, offset_T: Tensor, state: float | Tensor = math.nan) -> Tensor:
    """Carried logits m, [T, A], float32 and differentiable in z; the same recurrence as `math.carry`.

    `a_A`: the carry of each gate. `offset_T`: each token's offset in its piece (0 starts one). Each piece
    continues from `state`, [P, A] or one for all (NaN: the sequence starts here).
    """
    if not len(offset_T):
        return z_TA
    first_T, state = offset_T == 0, torch.as_tensor(state, device=z_TA.device)
    m_TA = (1 - a_A) * z_TA
    m_TA[first_T] = torch.where(state.isnan(), 0.0, a_A * state + m_TA[first_T])
    longest, largest = int(offset_T.max()) + 1, float(a_A.max())
    shift, power_A = 1, a_A
    while shift < longest and largest**shift > _NEGLIGIBLE:
        beyond_T1 = (offset_T[shift:] < shift)[:, None]  # the row `shift` rows before belongs to another piece
        # Masked, not multiplied by 0: another piece's NaN must not spread.
        m_TA[shift:] += (power_A * m_TA[:-shift]).masked_fill(beyond_T1, 0.0)
        shift, power_A = 2 * shift, power_A * power_A
    return m_TA
