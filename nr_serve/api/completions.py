"""POST /v1/completions: the answer's form, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence

from nr_serve.api.answers import Reporter, finish_reason, legacy_logprobs
from nr_serve.api.ask import Prompt
from nr_serve.api.responses import Completion, CompletionChoice, Envelope, LegacyLogprobs
from nr_serve.api.schemas import CompletionBody
from nr_serve.engine.messages import Output, Token
from nr_serve.tokenizer import Detokenizer, Tokenizer


def completion(envelope: Envelope, writers: Sequence[CompletionWriter], outputs: Sequence[Output]) -> Completion:
    """The whole answer: a choice of each writer, for its output."""
    choices = [writer.choice(output) for writer, output in zip(writers, outputs, strict=True)]
    return {**envelope, "object": "text_completion", "choices": choices}


class CompletionWriter:
    """Writes one answer. Owns where it is in the text, for `text_offset`, and whether the prompt is out."""

    def __init__(self, tokenizer: Tokenizer, body: CompletionBody, prompt: Prompt, index: int) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._prompt = prompt
        self._index = index
        self._report = Reporter(tokenizer, body, prompt)
        # As the text is: an echoed prompt that came as ids shows its special tokens.
        special = bool(body.echo) and prompt.text is None
        self._shown = Detokenizer(tokenizer, () if body.echo else prompt.ids, special_tokens=special)
        self._offset = 0
        self._first = True

    def opening(self, envelope: Envelope) -> None:
        """Completions begin with their text."""

    def parts(self, output: Output) -> list[Output]:
        """The output as it is."""
        return [output]

    def shows(self, output: Output) -> bool:
        """Whether the output has anything the client asked for."""
        body = self._body
        reported = body.logprobs is not None or body.gates or body.return_token_ids
        opens = self._first and (body.echo or output.prompt is not None)
        return bool(output.text or output.finish_reason or opens or (reported and output.tokens))

    def chunk(self, envelope: Envelope, output: Output) -> Completion:
        """The chunk for an output."""
        return {**envelope, "object": "text_completion", "choices": [self.choice(output)]}

    def closing(self, envelope: Envelope) -> Completion:
        """A chunk without choices."""
        return {**envelope, "object": "text_completion", "choices": []}

    def choice(self, output: Output) -> CompletionChoice:
        """The choice for an output."""
        first, self._first = self._first, False
        text = self._echoed() + output.text if first else output.text
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(output),
            "finish_reason": finish_reason(output),
            "stop_reason": output.stop_reason,
            **self._report.prompt(output, first=first),
            **self._report.tokens(output),
        }

    def _echoed(self) -> str:
        if not self._body.echo:
            return ""
        if self._prompt.text is not None:
            return self._prompt.text
        return self._tokenizer.decode(self._prompt.ids, special_tokens=True)

    def _logprobs(self, output: Output) -> LegacyLogprobs | None:
        if self._body.logprobs is None:
            return None
        tokens: tuple[Token, ...] = output.tokens
        if self._body.echo and output.prompt is not None:
            tokens = (*output.prompt, *tokens)
        return legacy_logprobs(tokens, self._body.logprobs, [self._begins(token) for token in tokens])

    def _begins(self, token: Token) -> int:
        """Where in the text the next token begins; of one that is part of a character, where that begins."""
        begins = self._offset
        self._offset += len(self._shown.push(token.id))
        return begins
