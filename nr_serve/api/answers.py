"""What completions and chat answers share: outputs joined, usage, log probabilities, gates."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Protocol

from nr_serve.api.ask import Ask
from nr_serve.engine.messages import Output, Token
from nr_serve.tokenizer import Detokenizer, Tokenizer


class Writer(Protocol):
    """Writes one answer in one API's form, from one output (whole) or many (in chunks)."""

    def parts(self, output: Output) -> list[Output]:
        """The output as the API shows it, one after the other; each is then written before the next output."""

    def extras(self, output: Output) -> dict[str, Any]:
        """Fields beside the choices; asked before `choice`."""

    def choice(self, output: Output) -> dict[str, Any]:
        """The JSON choice for an output."""

    def opening(self) -> dict[str, Any] | None:
        """A choice to send before the first output of a stream, if the API has one."""

    def shows(self, output: Output) -> bool:
        """Whether an output is worth a chunk."""


class Usage:
    """Tokens read and written so far; a prompt counts once, however many answers it gets."""

    def __init__(self, ask: Ask) -> None:
        self._prompt = ask.prompt_tokens
        self._completion = 0
        # Of each prompt's first answer: the others may find what that one computed.
        self._cached = {submit.request_id: 0 for submit in ask.submits[:: ask.tries]}

    def count(self, output: Output) -> None:
        """Add an output's tokens."""
        self._completion += len(output.tokens)
        if output.request_id in self._cached:
            self._cached[output.request_id] = output.cached_tokens

    def body(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


@dataclass(frozen=True)
class Envelope:
    """The fields around the choices."""

    id: str
    model: str
    fingerprint: str
    tier: str | None = None
    """The service tier, if the client named one."""
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One response, or one chunk of it."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            **({} if self.tier is None else {"service_tier": self.tier}),
            "choices": choices,
            **more,
        }


async def collect(ask: Ask, outputs: AsyncIterator[Output]) -> list[Output]:
    """Wait for every answer to end; return one output for each, in order."""
    parts: dict[str, list[Output]] = {submit.request_id: [] for submit in ask.submits}
    async for output in outputs:
        parts[output.request_id].append(output)
    return [join(each) for each in parts.values()]


def join(outputs: Sequence[Output]) -> Output:
    """Outputs of one answer as if it had come in one step."""
    return replace(
        outputs[-1],
        tokens=tuple(token for output in outputs for token in output.tokens),
        text="".join(output.text for output in outputs),
        prompt=next((output.prompt for output in outputs if output.prompt is not None), None),
    )


def best(ask: Ask, outputs: Sequence[Output]) -> list[Output]:
    """The `n` answers to each prompt with the highest log probability a token, the best first."""
    if ask.tries == ask.n:
        return list(outputs)
    groups = [outputs[at : at + ask.tries] for at in range(0, len(outputs), ask.tries)]
    return [output for group in groups for output in sorted(group, key=_mean_logprob, reverse=True)[: ask.n]]


def _mean_logprob(output: Output) -> float:
    return fmean([token.logprob or 0.0 for token in output.tokens] or [0.0])


def legacy_logprobs(tokens: Iterable[Token], k: int, offset: int) -> dict[str, Any]:
    """The completions API's parallel lists; `offset` is where the first token's text begins."""
    lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        lists["tokens"].append(token.text)
        lists["token_logprobs"].append(token.logprob)
        lists["top_logprobs"].append(_legacy_top(token, k))
        lists["text_offset"].append(offset)
        offset += len(token.text)
    return lists


def _legacy_top(token: Token, k: int) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    top: dict[str, float] = {}
    for _, text, logprob in token.top[:k]:
        top.setdefault(text, logprob)
    top.setdefault(token.text, token.logprob)
    return top


def prompt_logprobs(tokens: Iterable[Token], k: int) -> list[dict[str, Any] | None]:
    """vLLM's form: for each prompt token, ids with log probability, rank (if among the likeliest) and text."""
    return [_ranked(token, k) for token in tokens]


def _ranked(token: Token, k: int) -> dict[str, Any] | None:
    if token.logprob is None:
        return None
    entries: dict[str, Any] = {
        str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": text}
        for rank, (token_id, text, logprob) in enumerate(token.top[:k], start=1)
    }
    own = {"logprob": token.logprob, "rank": None, "decoded_token": token.text}
    entries.setdefault(str(token.id), own)
    return entries


class GateWriter:
    """Reports gates beside the text each token completes, so that a page can colour it."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._answer = Detokenizer(tokenizer, prompt_ids)

    def body(self, output: Output) -> dict[str, Any]:
        """The gates of an output's tokens, and of the prompt's if it brings them."""
        body: dict[str, Any] = {}
        if output.prompt is not None:
            text = Detokenizer(self._tokenizer, ())
            body["prompt"] = [dict(token.gates or {}) for token in output.prompt]
            body["prompt_text"] = [text.push(token.id) for token in output.prompt]
        body["tokens"] = [dict(token.gates or {}) for token in output.tokens]
        body["token_text"] = [self._answer.push(token.id) for token in output.tokens]
        return body
