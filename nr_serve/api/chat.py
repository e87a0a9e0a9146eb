"""POST /v1/chat/completions: the answer's format, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nr_serve.api.answers import Reporter, finish_reason
from nr_serve.api.ask import Prompt
from nr_serve.api.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    Choice,
    Envelope,
    PromptReport,
)
from nr_serve.api.schemas import ChatBody
from nr_serve.api.tools import Call, ToolReader
from nr_serve.engine.messages import Output, Token
from nr_serve.tokenizer import Tokenizer


def chat_completion(envelope: Envelope, writers: Sequence[ChatWriter], outputs: Sequence[Output]) -> ChatCompletion:
    """The whole answer, with one choice for each writer and its output."""
    report = writers[0].prompt_report(outputs[0])
    choices = [writer.choice(output) for writer, output in zip(writers, outputs, strict=True)]
    return {**envelope, "object": "chat.completion", "choices": choices, **report}


class ChatWriter:
    """Writes one answer, as a message or, if the body asks for a stream, as deltas of one."""

    def __init__(
        self, tokenizer: Tokenizer, body: ChatBody, prompt: Prompt, index: int, *, calls_tools: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._index = index
        self._reader = ToolReader() if calls_tools else None
        self._calls: list[Call] = []  # calls read but not yet written
        self._called = 0  # number of calls read so far
        self._report = Reporter(tokenizer, body, prompt)
        self._first = True

    def opening(self, envelope: Envelope) -> ChatChunk:
        """The chunk with the role, which comes before the text."""
        choice: ChatChunkChoice = {
            "index": self._index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }
        return _chunk(envelope, [choice], {})

    def parts(self, output: Output) -> list[Output]:
        """The output with tool calls taken out of its text; split if the finish reason needs a chunk of its own."""
        if self._reader is None:
            return [output]
        content, self._calls = self._reader.push(output.text)
        self._called += len(self._calls)
        if output.finish_reason is not None:
            content += self._reader.finish()
        output = replace(output, text=content)
        if not (self._calls and output.finish_reason and self._body.stream):
            return [output]
        # As OpenAI does: clients look for the finish reason in a chunk after the last call.
        last = Output(output.request_id, finish_reason=output.finish_reason, stop_reason=output.stop_reason)
        return [replace(output, finish_reason=None, stop_reason=None), last]

    def shows(self, output: Output) -> bool:
        """Whether the output has anything that the client asked for."""
        reported = self._body.logprobs or self._body.gates or self._body.return_token_ids
        opens = self._first and output.prompt is not None
        return bool(output.text or self._calls or output.finish_reason or opens or (reported and output.tokens))

    def chunk(self, envelope: Envelope, output: Output) -> ChatChunk:
        """The chunk for an output."""
        report = self.prompt_report(output)
        choice: ChatChunkChoice = {
            "delta": self._delta(output),
            "logprobs": self._logprobs(output),
            **self._choice(output),
        }
        return _chunk(envelope, [choice], report)

    def closing(self, envelope: Envelope) -> ChatChunk:
        """A chunk without choices, for the usage."""
        return _chunk(envelope, [], {})

    def choice(self, output: Output) -> ChatChoice:
        """The choice for an output that is the whole answer."""
        return {
            "message": self._message(output),
            "logprobs": self._logprobs(output),
            **self._choice(output),
        }

    def prompt_report(self, output: Output) -> PromptReport:
        """vLLM's prompt report, which goes beside the choices; call it before `choice`."""
        return self._report.prompt(output, first=self._first)

    def _choice(self, output: Output) -> Choice:
        self._first = False
        ended = finish_reason(output)
        return {
            "index": self._index,
            "finish_reason": "tool_calls" if self._called and ended == "stop" else ended,
            "stop_reason": output.stop_reason,
            **self._report.tokens(output),
        }

    def _message(self, output: Output) -> ChatMessage:
        content = None if self._calls and not output.text else output.text
        message: ChatMessage = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message["tool_calls"] = [call.body() for call in self._calls]
        self._calls = []
        return message

    def _delta(self, output: Output) -> ChatDelta:
        delta: ChatDelta = {"content": output.text} if output.text else {}
        if self._calls:
            first = self._called - len(self._calls)
            delta["tool_calls"] = [{"index": i, **call.body()} for i, call in enumerate(self._calls, first)]
        self._calls = []
        return delta

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return {"content": [self._logprob(token) for token in output.tokens], "refusal": None}

    def _logprob(self, token: Token) -> ChatTokenLogprob:
        likeliest = token.top[: self._body.top_logprobs or 0]
        return {
            **self._entry(token.id, token.text, token.logprob or 0.0),
            "top_logprobs": [self._entry(*each) for each in likeliest],
        }

    def _entry(self, token_id: int, text: str, logprob: float) -> ChatLogprob:
        return {"token": text, "logprob": logprob, "bytes": list(self._tokenizer.token_bytes(token_id))}


def _chunk(envelope: Envelope, choices: list[ChatChunkChoice], report: PromptReport) -> ChatChunk:
    return {**envelope, "object": "chat.completion.chunk", "choices": choices, **report}
