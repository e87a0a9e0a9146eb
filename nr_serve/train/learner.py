"""The learner: the base with what a method trains in it, and the loss of one batch.

Shape suffixes: B windows, T tokens a window.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nr_serve.train import losses
from nr_serve.train.attach import AdapterModule, Attached, window_inputs
from nr_serve.train.pack import Windows, join
from nr_serve.train.recipe import Loss

Batch = Mapping[str, tuple[Tensor, Tensor]]
"""Part (target, original, background) -> its windows' ids and offsets, both [B, T]; a part may be missing."""


class Learner(nn.Module):
    """A base and an adapter beside it, or none where the method trains the base's own layers.

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
        self.lm_on_original = lm_on_original

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that gradient steps move, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: the adapter, or what else is trained, by name."""
        if self.adapter is not None:
            return {f"adapter.{name}": tensor for name, tensor in self.adapter.state_dict().items()}
        return {name: p.detach() for name, p in self.trained().items()}

    def forward(self, **batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """`loss` = LM loss + alpha * local loss, with its parts and the shares of token-layers that fired.

        The local loss is gathered first, since gradient checkpointing runs the LM pass once more in the backward
        pass, and must then find what that pass was given.
        """
        parts = {name: Windows(*tensors) for name, tensors in batch.items()}
        quiet, other_fired = self._quiet_loss(parts)
        lm, target_fired = self._lm_loss(parts)
        loss = lm if quiet is None or self.local is None else lm + self.local.alpha * quiet
        if not loss.requires_grad:  # no gate fired at all
            loss = loss + 0.0 * sum(p.sum() for p in self.trained().values())
        none = lm.new_zeros(())
        return {
            "loss": loss,
            "lm": lm.detach(),
            "local": none if quiet is None else quiet.detach(),
            "target_fired": none + target_fired,
            "other_fired": none + other_fired,
        }

    def _lm_loss(self, parts: Mapping[str, Windows]) -> tuple[Tensor, float]:
        spoken = ("target", "original") if self.lm_on_original else ("target",)
        windows = join(parts[name] for name in spoken if name in parts)
        record = self.attached.begin(windows.offset_NT)
        output = self.base(windows.ids_NT, use_cache=False, **window_inputs(windows.offset_NT))
        labels = losses.next_token_labels(windows.ids_NT, windows.offset_NT)
        return losses.lm_loss(output.logits, labels), self._fired(record)

    def _quiet_loss(self, parts: Mapping[str, Windows]) -> tuple[Tensor | None, float]:
        """The local loss, and the share of token-layers that fired on text that is not the target's.

        Each block answers for its own residue: the gradient does not run down the stream, so these windows
        cost a forward pass and the few tokens that fired.
        """
        if self.local is None or self.adapter is None:
            return None, 0.0
        read = ("target", "original", "background") if self.local.kind == "cross-entropy" else _QUIET
        named = {name: parts[name] for name in read if name in parts}
        if not named:
            return None, 0.0
        windows = join(named.values())
        is_target_B = torch.cat([torch.full((len(w),), name == "target") for name, w in named.items()])
        is_target_BT = is_target_B[:, None].to(windows.ids_NT.device).expand_as(windows.ids_NT)
        with torch.no_grad(), _evaluating(self.base):
            record = self.attached.begin(windows.offset_NT, losses.LOCAL[self.local.kind], is_target_BT)
            decoder: Any = self.base.model
            decoder(windows.ids_NT, use_cache=False, **window_inputs(windows.offset_NT))
        loss = losses.local_loss(record.local_sum, windows.ids_NT.numel(), self.adapter.depth)
        return loss, self._fired(record)

    def _fired(self, record: Any) -> float:
        return 0.0 if self.adapter is None else float(record.fired_share(0))


_QUIET = ("original", "background")


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout and no gradient checkpointing inside."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
