"""Runs steps before anything is served, so that no request waits while GPU kernels are compiled or loaded."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from nr_serve.engine.messages import Sampling, Submit
from nr_serve.engine.model.gpu_sampler import outcome
from nr_serve.engine.request import Request
from nr_serve.engine.scheduler import Piece, spans
from nr_serve.neutral.gpu_bank import GpuBank
from nr_serve.neutral.kernels import FEW, MANY, MOST

if TYPE_CHECKING:
    from nr_serve.engine.model.runner import Runner

log = logging.getLogger(__name__)


@torch.inference_mode()
def warm_up(runner: Runner, most: int) -> None:
    """Run steps of up to `most` tokens, so that no request waits while kernels are compiled or loaded.

    For each size at which other kernel variants begin, runs a prompt from its start, and a single token beside a
    prompt that continues. Call it before anything is served: it writes to row 0 and to the first pages.
    """
    bank = runner.bank
    assert isinstance(bank, GpuBank)
    started, size = time.perf_counter(), runner.page_size
    longest = min(runner.pages * size, runner.info.max_model_len)
    for count in sorted({2, FEW + 1, MANY + 1, MOST + 1, most}):
        if count > min(most, longest - size - 1):
            continue
        request = _of_nothing(count + size + 1, size)
        single, goes_on = Piece(request, 0, 1), Piece(request, size, count - 1)
        for pieces in ([Piece(request, 0, count)], sorted([single, goes_on], key=lambda piece: piece.count)):
            ends = [end - 1 for _, end in spans(pieces)]
            batch = runner.batch(pieces, [0] * len(pieces), ends)
            bank.begin(batch.tokens, always=True)
            logits_NV, open_TS = runner.forward(batch)
            outcome(logits_NV, {0: request}, open_TS, batch.tokens.selected_TS)()
    bank.forget_row(0)
    log.info("kernels warmed up in %.0f s", time.perf_counter() - started)


def _of_nothing(tokens: int, page_size: int) -> Request:
    """A dummy request that uses every sampling method."""
    sampling = Sampling(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1)
    submit = Submit("nothing", (0,) * tokens, sampling)
    request = Request.outside(submit, row=0, pages=range(-(-tokens // page_size)))
    request.selection = ()
    return request
