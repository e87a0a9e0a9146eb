"""From a request's new token to its output: texts of tokens, log probabilities, gates. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nr_serve.engine.messages import Output, Token
from nr_serve.engine.request import Ending, Gates, Request, TopLogprobs
from nr_serve.engine.scheduler import Piece, Result
from nr_serve.tokenizer import Tokenizer


class Unwritten(NamedTuple):
    """A request's new token, or its end without one, of which no output was made yet."""

    request: Request
    token: int | None
    logprob: TopLogprobs | None
    gates: Gates | None
    prompt: tuple[Token, ...] | None
    """The prompt's tokens, if the output shows them."""
    ending: Ending | None
    text: str | None
    """What the token releases; None: not known yet."""


class OutputWriter:
    """Makes outputs, and collects what they say of prompts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def output(self, new: Unwritten) -> Output:
        """The output of a request's new token."""
        request, text, ending = new.request, new.text, new.ending
        tokens: tuple[Token, ...] = ()
        if new.token is not None:
            if text is None:
                text, ending = request.write(new.token, ending)
            tokens = (self._token(new.token, new.logprob, new.gates),)
        return Output(
            request.id,
            tokens,
            text or "",
            new.prompt,
            ending.reason if ending is not None else None,
            ending.stop if ending is not None else None,
            started=request.started,
            cached_tokens=request.cached_tokens,
        )

    def add_prompt(self, piece: Piece, result: Result, gates: Sequence[Gates]) -> tuple[Token, ...] | None:
        """Keep what a piece tells of the prompt. Returns the prompt's tokens if the next output is to show them."""
        request = piece.request
        _add_report(piece, result, gates)
        if not request.reports_prompt:
            return None
        self._write_prompt(piece)
        return tuple(request.prompt_tokens) if piece.samples and not request.generated else None

    def _write_prompt(self, piece: Piece) -> None:
        """Those tokens that are known by now: all of a long prompt in one step would hold up the others."""
        request = piece.request
        ids, logprobs, gates = request.submit.prompt_ids, request.prompt_logprobs, request.prompt_gates
        for i in range(len(request.prompt_tokens), min(piece.start + piece.count, len(ids))):
            # The first token has no log probability: nothing came before it.
            logprob = logprobs[i - 1] if 0 < i <= len(logprobs) else None
            request.prompt_tokens.append(self._token(ids[i], logprob, gates[i] if i < len(gates) else None))

    def _token(self, token_id: int, logprob: TopLogprobs | None, gates: Gates | None) -> Token:
        text = self._tokenizer.token_text
        own, likeliest = logprob or (None, ())
        return Token(token_id, text(token_id), own, tuple((i, text(i), p) for i, p in likeliest), gates)


def _add_report(piece: Piece, result: Result, gates: Sequence[Gates]) -> None:
    """Keep the prompt's log probabilities and gates; a preempted request computes some of them twice."""
    request = piece.request
    for position, logprob in enumerate(result.prompt_logprobs, start=piece.start):
        if position == len(request.prompt_logprobs):
            request.prompt_logprobs.append(logprob)
    for position, share in enumerate(gates, start=piece.start):
        if position == len(request.prompt_gates) and position < request.prompt_length:
            request.prompt_gates.append(share)
