"""What completions and chat answers share: outputs joined, usage, log probabilities, reports."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Protocol

from nr_serve.api.ask import Ask, Prompt
from nr_serve.api.responses import (
    ChatChunk,
    Completion,
    Envelope,
    FinishReason,
    Gates,
    LegacyLogprobs,
    PromptLogprob,
    PromptLogprobs,
    PromptReport,
    TokenReport,
    Usage,
)
from nr_serve.api.schemas import GenerationBody
from nr_serve.engine.messages import Output, Token
from nr_serve.tokenizer import Detokenizer, Tokenizer

Chunk = Completion | ChatChunk


class Writer(Protocol):
    """Writes one answer in one API's format, from one output (whole) or from many (in chunks)."""

    def parts(self, output: Output) -> list[Output]:
        """Split an output into the parts that the API shows one by one; each is written before the next output."""

    def opening(self, envelope: Envelope) -> Chunk | None:
        """The chunk to send before a stream's first output; None if the API has none."""

    def shows(self, output: Output) -> bool:
        """Whether an output needs a chunk."""

    def chunk(self, envelope: Envelope, output: Output) -> Chunk:
        """The chunk for an output."""

    def closing(self, envelope: Envelope) -> Chunk:
        """A chunk without choices that carries the usage in its envelope."""


class Tally:
    """Counts tokens read and written; each prompt counts once, however many answers it gets."""

    def __init__(self, ask: Ask) -> None:
        self._prompt = ask.prompt_tokens
        self._completion = 0
        # Only each prompt's first answer counts: the others may reuse what the first one computed.
        self._cached = {submit.request_id: 0 for submit in ask.submits[:: ask.tries]}

    def count(self, output: Output) -> None:
        """Add an output's tokens."""
        self._completion += len(output.tokens)
        if output.request_id in self._cached:
            self._cached[output.request_id] = output.cached_tokens

    def usage(self) -> Usage:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


def envelope(ask: Ask, body: GenerationBody, fingerprint: str) -> Envelope:
    """The fields around the choices, as of now; with a service tier only if the client named one."""
    around: Envelope = {
        "id": ask.id,
        "created": int(time.time()),
        "model": ask.model,
        "system_fingerprint": fingerprint,
    }
    if body.service_tier is not None:
        around["service_tier"] = "default"
    return around


async def collect(ask: Ask, outputs: AsyncIterator[Output]) -> list[Output]:
    """Wait for every answer to end; return one output for each, in order."""
    parts: dict[str, list[Output]] = {submit.request_id: [] for submit in ask.submits}
    async for output in outputs:
        parts[output.request_id].append(output)
    return [join(each) for each in parts.values()]


def join(outputs: Sequence[Output]) -> Output:
    """Join one answer's outputs into one, as if it had come in a single step."""
    return replace(
        outputs[-1],
        tokens=tuple(token for output in outputs for token in output.tokens),
        text="".join(output.text for output in outputs),
        prompt=next((output.prompt for output in outputs if output.prompt is not None), None),
    )


def best(ask: Ask, outputs: Sequence[Output]) -> list[Output]:
    """The `n` answers to each prompt with the highest mean log probability per token, best first."""
    if ask.tries == ask.n:
        return list(outputs)
    groups = [outputs[at : at + ask.tries] for at in range(0, len(outputs), ask.tries)]
    return [output for group in groups for output in sorted(group, key=_mean_logprob, reverse=True)[: ask.n]]


def _mean_logprob(output: Output) -> float:
    return fmean([token.logprob or 0.0 for token in output.tokens] or [0.0])


def finish_reason(output: Output) -> FinishReason | None:
    """Why the answer ended; None while it goes on. Never "error": `AsyncEngine.generate` raises errors instead."""
    assert output.finish_reason != "error"
    return output.finish_reason


def legacy_logprobs(tokens: Iterable[Token], k: int, offsets: Iterable[int]) -> LegacyLogprobs:
    """The completions API's parallel lists. `offsets`: where each token's text begins."""
    lists: LegacyLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, offset in zip(tokens, offsets, strict=True):
        lists["tokens"].append(token.text)
        lists["token_logprobs"].append(token.logprob)
        lists["top_logprobs"].append(_legacy_top(token, k))
        lists["text_offset"].append(offset)
    return lists


def _legacy_top(token: Token, k: int) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    top: dict[str, float] = {}
    for token_id, text, logprob in token.top[:k]:
        if text != token.text or token_id == token.id:  # different parts of characters all show as U+FFFD
            top.setdefault(text, logprob)
    top.setdefault(token.text, token.logprob)
    return top


def prompt_logprobs(tokens: Iterable[Token], k: int) -> PromptLogprobs:
    """vLLM's format: for each prompt token, id -> log probability, rank (if among the likeliest) and text."""
    return [_ranked(token, k) for token in tokens]


def _ranked(token: Token, k: int) -> dict[str, PromptLogprob] | None:
    if token.logprob is None:
        return None
    entries: dict[str, PromptLogprob] = {
        str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": text}
        for rank, (token_id, text, logprob) in enumerate(token.top[:k], start=1)
    }
    entries.setdefault(str(token.id), {"logprob": token.logprob, "rank": None, "decoded_token": token.text})
    return entries


class Reporter:
    """Makes the extra fields, beside the text, that the request body asks for; one per answer."""

    def __init__(self, tokenizer: Tokenizer, body: GenerationBody, prompt: Prompt) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._prompt = prompt
        self._answer = Detokenizer(tokenizer, prompt.ids, special_tokens=not body.skip_special_tokens)

    def prompt(self, output: Output, *, first: bool) -> PromptReport:
        """Report on the prompt. `first`: this is the first output that the answer shows."""
        report: PromptReport = {}
        if self._body.prompt_logprobs is not None and output.prompt is not None:
            report["prompt_logprobs"] = prompt_logprobs(output.prompt, self._body.prompt_logprobs)
        if self._body.return_token_ids and first:
            report["prompt_token_ids"] = list(self._prompt.ids)
        return report

    def tokens(self, output: Output) -> TokenReport:
        """Report on an output's tokens: ids and gates."""
        report: TokenReport = {}
        if self._body.return_token_ids:
            report["token_ids"] = [token.id for token in output.tokens]
        if self._body.gates:
            report["gates"] = self._gates(output)
        return report

    def _gates(self, output: Output) -> Gates:
        """Gates and texts of the output's tokens, and of the prompt's if included: a page can colour the text."""
        gates: Gates = {
            "tokens": [token.gates or {} for token in output.tokens],
            "token_text": [self._answer.push(token.id) for token in output.tokens],
        }
        if output.prompt is not None:
            text = Detokenizer(self._tokenizer, ())
            gates["prompt"] = [token.gates or {} for token in output.prompt]
            gates["prompt_text"] = [text.push(token.id) for token in output.prompt]
        return gates
