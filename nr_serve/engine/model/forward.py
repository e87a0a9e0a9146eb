"""Runs the model over a step's tokens, with the bank's residues and the KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from nr_serve.engine.model.attention import KVCache
    from nr_serve.engine.model.batch import Batch
    from nr_serve.engine.model.graphs import DecodeBatch
    from nr_serve.neutral.bank import Bank


def run_model(
    model: Any, bank: Bank, cache: KVCache, batch: Batch | DecodeBatch, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """Logits, float32 [N, V], and open layers by token and slot (None: none was open).

    `bank.begin` must have been called for the step, unless nothing is attached; the bank's step ends here, even if
    the model fails. `more` are further arguments of the model.
    """
    try:
        output = model(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.positions_T[None],
            use_cache=False,
            nr_batch=batch,
            nr_cache=cache,
            **more,
        )
        logits_NV = output.logits[0].float()
    except BaseException:
        bank.drop()
        raise
    return logits_NV, bank.end()
