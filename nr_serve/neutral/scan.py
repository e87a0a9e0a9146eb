"""The carry over many sequences at once: `math.carry` in log2(T) passes instead of T.

The recurrence is solved by doubling: after the pass with shift k, row t holds the weighted sum of its last 2k
logits (Hillis and Steele, 1986).
Shape suffixes: T tokens of all sequences laid end to end, P pieces of sequences, A gates, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_NEGLIGIBLE = 1e-9  # below float32's resolution: terms of less weight cannot change the sum


@dataclass(frozen=True, slots=True)
class Pass:
    """One doubling: rows take what stands `shift` rows before them, with weight a^shift."""

    shift: int
    power_A: Tensor
    beyond_T1: Tensor | None
    """Bool, of the rows from `shift` on: what stands there is another sequence's. None: of none."""


def passes(a_A: Tensor, largest: float, offset_T: Tensor, longest: int) -> list[Pass]:
    """The passes for tokens at these places of their pieces, the longest of which has `longest` tokens.

    `largest` is the largest of the carries `a_A`. Nothing is read from the tensors, so a device need not wait.
    """
    made = []
    shift, power_A = 1, a_A
    one_piece = longest == len(offset_T)
    while shift < longest and largest**shift > _NEGLIGIBLE:
        made.append(Pass(shift, power_A, None if one_piece else (offset_T[shift:] < shift)[:, None]))
        shift, power_A = shift * 2, power_A * power_A
    return made


def carry_on(m_TA: Tensor, doublings: Sequence[Pass]) -> Tensor:
    """Carried logits, in place, from each row's own term, (1 - a) z; a piece's first row is m already."""
    for each in doublings:
        added = each.power_A * m_TA[: -each.shift]
        if each.beyond_T1 is not None:
            # Filled, not times 0: another sequence's NaN must not come over.
            added = added.masked_fill(each.beyond_T1, 0.0)
        m_TA[each.shift :] += added
    return m_TA


@dataclass(frozen=True, slots=True)
class StepCarries:
    """The carry of a step through many layers: what they share is made once. L: a tuple of one tensor per layer."""

    carried_L: tuple[Tensor, ...]
    """[P, A]: a times the state the piece continues from."""
    nothing_L: tuple[Tensor, ...]
    """[P, A]: whether nothing came before, so that the first token's m is 0, whatever its logit."""
    share_A: Tensor
    """Weight of a token's own logit, 1 - a."""
    first_P: Tensor | None
    """Index of each piece's first token; None in a step of single tokens: all are."""
    doublings: list[Pass]

    @classmethod
    def of(
        cls, a_A: Tensor, largest: float, before_LPA: Tensor, offset_T: Tensor, last_P: Tensor, longest: int
    ) -> StepCarries:
        """For pieces that end at `last_P` and continue from the states `before_LPA`, NaN where nothing came before.

        The rest is as in `passes`.
        """
        nothing_LPA = before_LPA.isnan()
        return cls(
            carried_L=(a_A * before_LPA).unbind(),
            nothing_L=nothing_LPA.unbind(),
            share_A=1 - a_A,
            first_P=None if longest == 1 else F.pad(last_P[:-1] + 1, (1, 0)),
            doublings=passes(a_A, largest, offset_T, longest),
        )

    def carry(self, layer: int, z_TA: Tensor, m_TA: Tensor) -> None:
        """Carried logits of a layer, from its logits z, into m."""
        if self.first_P is None:
            torch.addcmul(self.carried_L[layer], z_TA, self.share_A, out=m_TA).masked_fill_(
                self.nothing_L[layer], 0.0
            )
            return
        torch.mul(z_TA, self.share_A, out=m_TA)
        first_PA = (self.carried_L[layer] + m_TA[self.first_P]).masked_fill_(self.nothing_L[layer], 0.0)
        carry_on(m_TA.index_copy_(0, self.first_P, first_PA), self.doublings)


def segmented_carry(z_TA: Tensor, a_A: Tensor, offset_T: Tensor) -> Tensor:
    """Carried logits m of whole sequences, [T, A], float32 and differentiable in z.

    `a_A` is the carry of each gate. `offset_T` counts a token's place in its sequence (0 starts one). Same
    recurrence as `math.carry`.
    """
    if not len(offset_T):
        return z_TA
    m_TA = ((1 - a_A) * z_TA).masked_fill((offset_T == 0)[:, None], 0.0)
    return carry_on(m_TA, passes(a_A, float(a_A.max()), offset_T, int(offset_T.max()) + 1))
