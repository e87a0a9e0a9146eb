"""The learner: the base with what a method trains in it, and the loss of one batch.

Shape suffixes: B windows, T tokens per window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nr_serve.train import losses
from nr_serve.train.attach import Attached
from nr_serve.train.blocks import AdapterModule
from nr_serve.train.measure import evaluating
from nr_serve.train.recipe import Loss
from nr_serve.train.text.pack import Windows, join

Batch = Mapping[str, Any]
"""Role (target, original, background) -> its windows' ids and offsets, both [B, T]; a role may be missing.

`step`, if present, is the `StepCounts` of the gradient step that the batch is a part of.
"""

Sums = dict[str, Tensor]
"""Name -> (sum, count), float64 [2]; added up over batches and divided, they give means."""


@dataclass(frozen=True)
class StepCounts:
    """Token counts of a whole gradient step: losses are means over all of it, however it is divided into parts."""

    tokens: Mapping[str, int]
    """Number of tokens, by role."""
    labelled: Mapping[str, int]
    """Number of tokens with a label, by role."""
    parts: int = 1
    """Number of batches that the step is divided into."""

    @classmethod
    def of(cls, windows: Mapping[str, Windows], parts: int = 1) -> StepCounts:
        """The counts of a step that reads these windows."""
        tokens = {role: each.ids_NT.numel() for role, each in windows.items()}
        return cls(tokens, {role: each.labelled for role, each in windows.items()}, parts)


class Learner(nn.Module):
    """A base with an adapter beside it, or without one if the method trains the base's own layers.

    `local` is None for a method without a local loss.
    """

    def __init__(
        self, base: nn.Module, adapter: AdapterModule | None, *, local: Loss | None, lm_on_original: bool
    ) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.attached = Attached(base, [adapter] if adapter is not None else [])
        self.local = local
        self.lm_roles = ("target", "original") if lm_on_original else ("target",)
        """Roles whose windows have the LM loss."""
        self.local_roles = _local_roles(local)
        """Roles whose windows have the local loss."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def trained_state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must hold, by name: the adapter's, or else all trained ones."""
        if self.adapter is not None:
            return {f"adapter.{name}": tensor for name, tensor in self.adapter.state_dict().items()}
        return {name: p.detach() for name, p in self.trained().items()}

    def forward(self, step: StepCounts | None = None, **batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """`loss` = LM loss + alpha * local loss + open * hinge; `sums`: the first two losses and what fired.

        Each loss is a mean over the whole `step` (None: the batch is the step), scaled so that the mean over the
        step's parts is the step's loss. The LM loss is a mean of -log p(label) over labelled tokens, the local
        loss a mean of its terms over tokens and blocks. The local loss is computed first: gradient checkpointing
        repeats the LM pass in the backward pass, which must then still find that pass's record attached.
        """
        windows = {role: Windows(*tensors) for role, tensors in batch.items()}
        step = StepCounts.of(windows) if step is None else step
        local, local_sums = self._local_loss(windows, step)
        lm, lm_sums = self._lm_loss(windows, step)
        loss = lm if local is None or self.local is None else lm + self.local.alpha * local
        if not loss.requires_grad:  # no gate fired, so no trained parameter was used
            loss = loss + 0.0 * sum(p.sum() for p in self.trained().values())
        return {"loss": loss * step.parts, "sums": lm_sums | local_sums}

    def _lm_loss(self, windows: Mapping[str, Windows], step: StepCounts) -> tuple[Tensor, Sums]:
        read, target_BT = _join(windows, self.lm_roles)
        record = self.attached.begin(read.offset_NT, target_BT=target_BT)
        if self.local is not None and self.local.open:
            record.hinges = []
        output = self.base(read.ids_NT, use_cache=False, position_ids=read.offset_NT)
        nats = losses.lm_loss(output.logits, losses.next_token_labels(read.ids_NT, read.offset_NT))
        fired = (0, 0) if self.adapter is None else record.on_target(0)
        sums = {"lm": _pair(nats, read.labelled), "target_fired": _pair(nats.new_tensor(fired[0]), fired[1])}
        loss = nats / max(1, _count(step.labelled, self.lm_roles))
        if self.local is not None and record.hinges and self.adapter is not None:
            over = _count(step.tokens, ("target",)) * len(self.adapter.layers)
            loss = loss + self.local.open * torch.stack(list(record.hinges)).sum() / over
            # Gradient checkpointing computes them once more, in the backward pass: nobody needs those.
            record.hinges = deque(maxlen=0)
        return loss, sums

    def _local_loss(self, windows: Mapping[str, Windows], step: StepCounts) -> tuple[Tensor | None, Sums]:
        """The local loss, with its sums, which are over text other than the target's.

        Each block's loss depends only on its own residue: no gradient flows through the stream, so these windows
        cost a forward pass, and a backward pass only for the few tokens that fired.
        """
        nothing = next(iter(windows.values())).ids_NT.new_zeros(2, dtype=torch.float64)
        if self.local is None or self.adapter is None or not windows.keys() & set(self.local_roles):
            return None, {"local": nothing, "other_fired": nothing}
        read, target_BT = _join(windows, self.local_roles)
        decoder: Any = self.base.model
        with evaluating(self.base):
            record = self.attached.begin(read.offset_NT, losses.LOCAL[self.local.kind], target_BT)
            decoder(read.ids_NT, use_cache=False, position_ids=read.offset_NT)
        terms, layers = record.local_sum, len(self.adapter.layers)
        fired, seen = record.on_others(0)
        sums = {
            "local": _pair(nothing[0] if terms is None else terms, read.ids_NT.numel() * layers),
            "other_fired": _pair(nothing.new_tensor(fired), seen),
        }
        return None if terms is None else terms / (_count(step.tokens, self.local_roles) * layers), sums


def _local_roles(local: Loss | None) -> tuple[str, ...]:
    if local is None or not local.alpha:
        return ()
    # A classifier needs both positive and negative tokens.
    return ("target", "original", "background") if local.kind == "cross-entropy" else ("original", "background")


def _join(windows: Mapping[str, Windows], roles: tuple[str, ...]) -> tuple[Windows, Tensor]:
    """The windows of these roles, one after another, and which tokens are target text, bool [B, T]."""
    named = {role: windows[role] for role in roles if role in windows}
    read = join(named.values())
    target_B = torch.cat([torch.full((len(each),), role == "target") for role, each in named.items()])
    return read, target_B[:, None].to(read.ids_NT.device).expand_as(read.ids_NT)


def _count(counts: Mapping[str, int], roles: tuple[str, ...]) -> int:
    return sum(counts.get(role, 0) for role in roles)


def _pair(total: Tensor, over: int) -> Tensor:
    total = total.detach().double()
    return torch.stack([total, torch.full_like(total, over)])
