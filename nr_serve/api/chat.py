"""POST /v1/chat/completions: the answer's form, whole and in chunks."""

from __future__ import annotations

from typing import Any

from nr_serve.api.answers import GateWriter, prompt_logprobs
from nr_serve.api.ask import Prompt
from nr_serve.api.schemas import ChatBody
from nr_serve.engine.messages import Output, Token
from nr_serve.tokenizer import Tokenizer

OBJECT = "chat.completion"
CHUNK = "chat.completion.chunk"


class ChatWriter:
    """Writes one answer, as a message or, with `streamed`, as deltas of one."""

    def __init__(
        self, tokenizer: Tokenizer, body: ChatBody, prompt: Prompt, index: int, *, streamed: bool = False
    ) -> None:
        self._body = body
        self._prompt = prompt
        self._index = index
        self._streamed = streamed
        self._gates = GateWriter(tokenizer, prompt.ids) if body.gates else None
        self._first = True

    def opening(self) -> dict[str, Any]:
        """The role comes before the text."""
        delta = {"role": "assistant", "content": ""}
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def shows(self, output: Output) -> bool:
        """Whether the output has anything the client asked for."""
        reported = self._body.logprobs or self._body.gates or self._body.return_token_ids
        opens = self._first and output.prompt is not None
        return bool(output.text or output.finish_reason or opens or (reported and output.tokens))

    def extras(self, output: Output) -> dict[str, Any]:
        """What vLLM reports of the prompt, beside the choices."""
        extras: dict[str, Any] = {}
        if self._body.prompt_logprobs is not None and output.prompt is not None:
            extras["prompt_logprobs"] = prompt_logprobs(output.prompt, self._body.prompt_logprobs)
        if self._body.return_token_ids and self._first:
            extras["prompt_token_ids"] = list(self._prompt.ids)
        return extras

    def choice(self, output: Output) -> dict[str, Any]:
        """The JSON choice for an output."""
        self._first = False
        choice: dict[str, Any] = {
            "index": self._index,
            **self._content(output),
            "logprobs": {"content": [self._logprob(token) for token in output.tokens], "refusal": None}
            if self._body.logprobs
            else None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = [token.id for token in output.tokens]
        if self._gates is not None:
            choice["gates"] = self._gates.body(output)
        return choice

    def _content(self, output: Output) -> dict[str, Any]:
        if self._streamed:
            return {"delta": {"content": output.text} if output.text else {}}
        return {"message": {"role": "assistant", "content": output.text, "refusal": None}}

    def _logprob(self, token: Token) -> dict[str, Any]:
        likeliest = token.top[: self._body.top_logprobs or 0]
        return _entry(token.text, token.logprob or 0.0) | {
            "top_logprobs": [_entry(text, logprob) for _, text, logprob in likeliest]
        }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
