"""Turns a piece's logits into its next token and log probabilities, whatever else is in its step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nr_serve.engine.model.sampler import NOT_A_NUMBER, allow, log_probabilities, sample, takes_likeliest
from nr_serve.engine.request import TopLogprobs
from nr_serve.engine.scheduler import Piece, Result
from nr_serve.errors import NrError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step left on the host, but for its logits. N rows of logits, T tokens, S slots."""

    likeliest_N: Sequence[int]
    """Likeliest token by row; `NOT_A_NUMBER` for a row with NaN."""
    drawn: Mapping[int, int]
    """Next token by row, of the rows drawn from already."""
    open_TS: Tensor | None
    """Number of layers open, by token and slot; None: none was open."""
    selected_TS: Tensor
    """Which slots each token may use."""


def logit_positions(piece: Piece) -> list[int]:
    """Positions in the piece whose logits are needed: the last if it samples, and the prompt's if it reports them.

    For a piece on trial, all positions.
    """
    sampling = piece.request.sampling
    if piece.trial is not None:
        return list(range(piece.count))
    if sampling.prompt_logprobs is None:
        return [piece.count - 1] if piece.wants_token else []
    last_of_prompt = piece.request.prompt_length - 1
    scored = [p for p in range(piece.count) if piece.start + p < last_of_prompt]
    return [*scored, piece.count - 1] if piece.wants_token else scored


def draws(piece: Piece) -> bool:
    """Whether the piece's next token must be sampled, and is not just the likeliest token."""
    return piece.wants_token and not takes_likeliest(piece.request)


def guarded_result(
    piece: Piece,
    logits_NV: Tensor,
    rows: slice,
    likeliest_N: Sequence[int],
    fired_nS: Tensor | None,
    drawn: int | None = None,
) -> Result:
    """The piece's result from the step's logits, float32 [N, V], and the likeliest token of each of their rows.

    `rows` are the piece's own, those at its `logit_positions`. A failure becomes the result's error and affects no
    other request of the step. `fired_nS`: number of layers fired, by token of the piece and slot; None if the
    request does not ask for it. `drawn`: the next token, if it was already sampled.
    """
    try:
        return _result(piece, logits_NV, rows, likeliest_N, fired_nS, drawn)
    except NrError as error:
        return Result(None, error=error)
    except Exception:
        log.exception("request %s could not be sampled", piece.request.id)
        return Result(None, error=NrError("this request could not be sampled; the server's log says why"))


def _result(
    piece: Piece,
    logits_NV: Tensor,
    rows: slice,
    likeliest_N: Sequence[int],
    fired_nS: Tensor | None,
    drawn: int | None,
) -> Result:
    if NOT_A_NUMBER in likeliest_N[rows]:
        raise NrError("the logits of this request are not numbers")
    request, sampling = piece.request, piece.request.sampling
    token, logprob, last = None, None, rows.stop - 1
    if piece.wants_token:
        token = likeliest_N[last] if takes_likeliest(request) else drawn
        # Logits are not touched where their likeliest is all that is asked for: each use takes microseconds.
        if token is None or sampling.logprobs is not None:
            logits_V = allow(logits_NV[last], request.progress)
            if token is None:
                token = sample(logits_V, request)
            if sampling.logprobs is not None:
                logprob = log_probabilities(logits_V[None], [token], sampling.logprobs)[0]
    scored: list[TopLogprobs] = []
    if sampling.prompt_logprobs is not None:
        prompt_NV = logits_NV[rows.start : last if piece.wants_token else rows.stop]
        following = request.tokens[piece.start + 1 : piece.start + 1 + len(prompt_NV)]
        scored = log_probabilities(prompt_NV, following, sampling.prompt_logprobs) if following else []
    fired = tuple(map(tuple, fired_nS.tolist())) if fired_nS is not None else ()
    return Result(token, logprob, tuple(scored), fired)
