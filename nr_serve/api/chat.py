"""POST /v1/chat/completions: the answer's form, whole and in chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nr_serve.api.answers import GateWriter, prompt_logprobs
from nr_serve.api.ask import Prompt
from nr_serve.api.schemas import ChatBody
from nr_serve.api.tools import Call, ToolReader
from nr_serve.engine.messages import Output, Token
from nr_serve.tokenizer import Tokenizer

OBJECT = "chat.completion"
CHUNK = "chat.completion.chunk"


class ChatWriter:
    """Writes one answer, as a message or, if the body asks for a stream, as deltas of one."""

    def __init__(
        self, tokenizer: Tokenizer, body: ChatBody, prompt: Prompt, index: int, *, calls_tools: bool = False
    ) -> None:
        self._body = body
        self._prompt = prompt
        self._index = index
        self._reader = ToolReader() if calls_tools else None
        self._calls: list[Call] = []  # read, not yet written
        self._called = 0  # read in all
        self._gates = GateWriter(tokenizer, prompt.ids) if body.gates else None
        self._first = True

    def opening(self) -> dict[str, Any]:
        """The role comes before the text."""
        delta = {"role": "assistant", "content": ""}
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def parts(self, output: Output) -> list[Output]:
        """The output with the tool calls taken out of its text."""
        if self._reader is None:
            return [output]
        content, self._calls = self._reader.push(output.text)
        self._called += len(self._calls)
        if output.finish_reason is not None:
            content += self._reader.finish()
        output = replace(output, text=content)
        if not (self._calls and output.finish_reason and self._body.stream):
            return [output]
        # As OpenAI does: its clients look for the reason in a chunk after the last call.
        last = Output(output.request_id, finish_reason=output.finish_reason, stop_reason=output.stop_reason)
        return [replace(output, finish_reason=None, stop_reason=None), last]

    def shows(self, output: Output) -> bool:
        """Whether the output has anything the client asked for."""
        reported = self._body.logprobs or self._body.gates or self._body.return_token_ids
        opens = self._first and output.prompt is not None
        return bool(output.text or self._calls or output.finish_reason or opens or (reported and output.tokens))

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
            **(self._delta(output) if self._body.stream else self._message(output)),
            "logprobs": {"content": [self._logprob(token) for token in output.tokens], "refusal": None}
            if self._body.logprobs
            else None,
            "finish_reason": self._finish_reason(output),
            "stop_reason": output.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = [token.id for token in output.tokens]
        if self._gates is not None:
            choice["gates"] = self._gates.body(output)
        return choice

    def _message(self, output: Output) -> dict[str, Any]:
        content = None if self._calls and not output.text else output.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message["tool_calls"] = [call.body() for call in self._calls]
        self._calls = []
        return {"message": message}

    def _delta(self, output: Output) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": output.text} if output.text else {}
        if self._calls:
            first = self._called - len(self._calls)
            delta["tool_calls"] = [{"index": i} | call.body() for i, call in enumerate(self._calls, first)]
        self._calls = []
        return {"delta": delta}

    def _finish_reason(self, output: Output) -> str | None:
        return "tool_calls" if self._called and output.finish_reason == "stop" else output.finish_reason

    def _logprob(self, token: Token) -> dict[str, Any]:
        likeliest = token.top[: self._body.top_logprobs or 0]
        return _entry(token.text, token.logprob or 0.0) | {
            "top_logprobs": [_entry(text, logprob) for _, text, logprob in likeliest]
        }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
