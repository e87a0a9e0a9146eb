"""POST /v1/completions: the answer's form, whole and in chunks."""

from __future__ import annotations

from typing import Any

from nr_serve.api.answers import GateWriter, legacy_logprobs, prompt_logprobs
from nr_serve.api.ask import Prompt
from nr_serve.api.schemas import CompletionBody
from nr_serve.engine.messages import Output, Token
from nr_serve.tokenizer import Tokenizer

OBJECT = CHUNK = "text_completion"


class CompletionWriter:
    """Writes one answer. Owns where it is in the text, for `text_offset`, and whether the prompt is out."""

    def __init__(self, tokenizer: Tokenizer, body: CompletionBody, prompt: Prompt, index: int) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._prompt = prompt
        self._index = index
        self._gates = GateWriter(tokenizer, prompt.ids) if body.gates else None
        self._offset = 0
        self._first = True

    def opening(self) -> None:
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

    def extras(self, output: Output) -> dict[str, Any]:
        """Completions say everything in the choice."""
        return {}

    def choice(self, output: Output) -> dict[str, Any]:
        """The JSON choice for an output."""
        first, self._first = self._first, False
        text = self._echoed() + output.text if first else output.text
        choice: dict[str, Any] = {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(output),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._body.prompt_logprobs is not None and output.prompt is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt, self._body.prompt_logprobs)
        if self._body.return_token_ids:
            choice["token_ids"] = [token.id for token in output.tokens]
            if first:
                choice["prompt_token_ids"] = list(self._prompt.ids)
        if self._gates is not None:
            choice["gates"] = self._gates.body(output)
        return choice

    def _echoed(self) -> str:
        if not self._body.echo:
            return ""
        if self._prompt.text is not None:
            return self._prompt.text
        return self._tokenizer.decode(self._prompt.ids, special_tokens=True)

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        tokens: tuple[Token, ...] = output.tokens
        if self._body.echo and output.prompt is not None:
            tokens = (*output.prompt, *tokens)
        lists = legacy_logprobs(tokens, self._body.logprobs, self._offset)
        self._offset += sum(len(token.text) for token in tokens)
        return lists
