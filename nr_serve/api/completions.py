"""POST /v1/completions: the answer's format, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence

from nr_serve.api.answers import Reporter, finish_reason, legacy_logprobs
from nr_serve.api.ask import Prompt
from nr_serve.api.responses import Completion, CompletionChoice, Envelope, LegacyLogprobs
from nr_serve.api.schemas import CompletionBody
from nr_serve.engine.messages import Output, Token
from nr_serve.tokenizer import Detokenizer, Tokenizer


def completion(envelope: Envelope, writers: Sequence[CompletionWriter], outputs: Sequence[Output]) -> Completion:
    """The whole answer, with one choice for each writer and its output."""
    choices = [writer.choice(output) for writer, output in zip(writers, outputs, strict=True)]
    return {**envelope, "object": "text_completion", "choices": choices}


class CompletionWriter:
    """Writes one answer. Tracks its place in the text, for `text_offset`, and whether the prompt is sent."""

    def __init__(self, tokenizer: Tokenizer, body: CompletionBody, prompt: Prompt, index: int) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._prompt = prompt
        self._index = index
        self._report = Reporter(tokenizer, body, prompt)
        # Special tokens as in the text: an echoed prompt shows them, an answer only if asked to.
        self._echo = Detokenizer(tokenizer, (), special_tokens=True)
        self._shown = Detokenizer(tokenizer, prompt.ids, special_tokens=not body.skip_special_tokens)
        self._offset = 0
        self._first = True

    def opening(self, envelope: Envelope) -> None:
        """None: completions start with their text."""

    def parts(self, output: Output) -> list[Output]:
        """The output, unsplit."""
        return [output]

    def shows(self, output: Output) -> bool:
        """Whether the output has anything that the client asked for."""
        body = self._body
        reported = body.logprobs is not None or body.gates or body.return_token_ids
        opens = self._first and (body.echo or output.prompt is not None)
        return bool(output.text or output.finish_reason or opens or (reported and output.tokens))

    def chunk(self, envelope: Envelope, output: Output) -> Completion:
        """The chunk for an output."""
        return {**envelope, "object": "text_completion", "choices": [self.choice(output)]}

    def closing(self, envelope: Envelope) -> Completion:
        """A chunk without choices, for the usage."""
        return {**envelope, "object": "text_completion", "choices": []}

    def choice(self, output: Output) -> CompletionChoice:
        """The choice for an output."""
        first, self._first = self._first, False
        text = self._prompt.echo + output.text if first else output.text
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(output),
            "finish_reason": finish_reason(output),
            "stop_reason": output.stop_reason,
            **self._report.prompt(output, first=first),
            **self._report.tokens(output),
        }

    def _logprobs(self, output: Output) -> LegacyLogprobs | None:
        if self._body.logprobs is None:
            return None
        echoed: tuple[Token, ...] = output.prompt or () if self._body.echo else ()
        offsets = [self._moves(self._echo_of(token)) for token in echoed]
        offsets += [self._moves(self._shown.push(token.id)) for token in output.tokens]
        return legacy_logprobs((*echoed, *output.tokens), self._body.logprobs, offsets)

    def _echo_of(self, token: Token) -> str:
        """The echoed text of a prompt token; "" for a token that the tokenizer added before the text."""
        text = self._echo.push(token.id)
        written = self._prompt.text
        if written is None or not self._tokenizer.is_special(token.id):
            return text
        return text if written.startswith(text, self._offset) else ""

    def _moves(self, text: str) -> int:
        """Offset where a token with this text begins; a token with part of a character begins where that does."""
        begins = self._offset
        self._offset += len(text)
        return begins
