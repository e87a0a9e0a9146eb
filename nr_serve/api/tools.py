"""Tools the model may call: their definitions, the grammar that makes it call, and calls read from its answer.

Calls are in the form that Hermes and Qwen models are trained on, `<tool_call>{"name": ..., "arguments": {...}}
</tool_call>`; their chat templates write tools and earlier calls into the prompt.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, PrivateAttr, TypeAdapter, field_validator, model_validator

from nr_serve.api.body import MOST_BRACKETS, Body, JsonObject, Name, Text, whole_characters
from nr_serve.api.responses import ToolCalled
from nr_serve.api.structured import ANY_OBJECT, json_rule
from nr_serve.errors import BadRequest

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_CLOSES = 32
"""Closing tags tried for one call: each try parses the whole call."""
MAX_TOOLS = 128  # as in OpenAI's API
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: Name
    description: Text | None = None
    parameters: JsonObject | None = Field(None, description="JSON schema of its arguments; default: none")
    strict: bool | None = Field(None, description="hold the arguments to the schema also where calling is free")

    @field_validator("parameters")
    @classmethod
    def _arguments_are_an_object(cls, parameters: JsonObject | None) -> JsonObject | None:
        if parameters is not None and parameters.get("type", "object") != "object":
            raise ValueError("arguments are an object: the schema's `type` must be `object`")
        return parameters

    def schema_rule(self) -> str:
        """Its arguments as a rule. What a schema says beyond grammars counts only if it is `strict`."""
        schema = _NO_PARAMETERS if self.parameters is None else ANY_OBJECT | self.parameters
        return json_rule(schema, lenient=not self.strict)


class Tool(Body):
    """A tool: only functions can be called."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    """A function, by name."""

    name: Name


class ToolName(Body):
    """A tool, by name."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    """Some of the tools, and whether one must be called."""

    mode: Literal["auto", "required"]
    tools: list[ToolName] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolChoice(Body):
    """OpenAI's `tool_choice` of some tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


_arguments = TypeAdapter(JsonObject).validate_python


class FunctionCall(Body):
    """A function called earlier in the conversation."""

    name: Text
    arguments: Text = Field(description="a JSON object")

    _parsed: dict[str, Any] = PrivateAttr()

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> FunctionCall:
        # The body may spell brackets as \u005b, so its own count does not bound these.
        if self.arguments.count("[") + self.arguments.count("{") > MOST_BRACKETS:
            raise ValueError(f"`arguments` hold more than {MOST_BRACKETS:,} opening brackets")
        try:
            self._parsed = _arguments(json.loads(self.arguments or "{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`arguments` are not a JSON object: {error}") from error
        return self

    def parsed(self) -> dict[str, Any]:
        """The arguments as an object."""
        return self._parsed


class ToolCall(Body):
    """A tool call earlier in the conversation."""

    id: Text
    type: Literal["function"]
    function: FunctionCall
    index: int | None = Field(None, description="as streams give it; not used")

    def plain(self) -> dict[str, Any]:
        """The call in the form that chat templates take."""
        function = {"name": self.function.name, "arguments": self.function.parsed()}
        return {"id": self.id, "type": "function", "function": function}


ToolChoice = Literal["none", "auto", "required"] | ToolName | AllowedToolChoice


@dataclass(frozen=True)
class Toolbox:
    """The tools that one answer may call."""

    tools: tuple[Tool, ...] = ()
    must_call: bool = False
    at_most_one: bool = False

    def plain(self) -> list[dict[str, Any]]:
        """The tools in the form that chat templates take."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    @property
    def guided(self) -> bool:
        """Whether calls need a grammar; without requirements the model writes them freely."""
        return bool(self.tools) and (
            self.must_call or self.at_most_one or any(tool.function.strict for tool in self.tools)
        )

    def grammar(self, answer: str | None = None) -> str | None:
        """Grammar of the answer; None if the answer is free. `answer`: rule for an answer without calls."""
        free = not self.must_call and answer is None
        if free and not self.guided:
            return None
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(self.tools)))}"]
        for i, tool in enumerate(self.tools):
            head = json.dumps(f'\n{{"name": "{tool.function.name}", "arguments": ')
            tail = json.dumps(f"}}\n{CLOSE}")
            rules += [f"call_{i}: {head} arguments_{i} {tail}", f"arguments_{i}: {tool.function.schema_rule()}"]
        return "\n".join([*(self._free() if free else self._bound(answer)), *rules])

    def _bound(self, answer: str | None) -> list[str]:
        """Rules for calls only, or, if none is required, for an answer of the given form instead."""
        more = "" if self.at_most_one else ' ("\\n" tagged)*'
        start = f"start: tagged{more}" + ("" if self.must_call else " | answer")
        return [start, f'tagged: "{OPEN}" call', *([] if self.must_call else [f"answer: {answer}"])]

    def _free(self) -> list[str]:
        """Rules for any text in which every opening tag starts a call."""
        start = "start: tagged | rest" if self.at_most_one else "start: tagged* rest"
        # Lazy: the text ends at the first tag, so that only a call can follow.
        text = ["rest: TEXT", "TEXT: /(.|\\n)*/", f'opened[lazy]: TEXT "{OPEN}"']
        return [start, "tagged: opened call", *text]


NO_TOOLS = Toolbox()


def toolbox(tools: Sequence[Tool], choice: Any, parallel: bool | None) -> Toolbox:
    """The tools that `tool_choice` (one of `ToolChoice`) leaves. Raises BadRequest."""
    if not tools:
        if choice not in (None, "none"):
            raise BadRequest("`tool_choice` is only allowed with `tools`", param="tool_choice")
        if parallel is not None:
            raise BadRequest("`parallel_tool_calls` is only allowed with `tools`", param="parallel_tool_calls")
        return NO_TOOLS
    by_name = {tool.function.name: tool for tool in tools}
    if len(by_name) < len(tools):
        raise BadRequest("tools: a name is given twice", param="tools")
    if choice == "none":
        return NO_TOOLS
    one = parallel is False
    if isinstance(choice, ToolName):
        return Toolbox(_pick(by_name, [choice]), must_call=True, at_most_one=True)
    if isinstance(choice, AllowedToolChoice):
        allowed = choice.allowed_tools
        return Toolbox(_pick(by_name, allowed.tools), must_call=allowed.mode == "required", at_most_one=one)
    return Toolbox(tuple(tools), must_call=choice == "required", at_most_one=one)


def _pick(by_name: dict[str, Tool], chosen: Sequence[ToolName]) -> tuple[Tool, ...]:
    for each in chosen:
        if each.function.name not in by_name:
            raise BadRequest(f"tool_choice: no tool is called {each.function.name!r}", param="tool_choice")
    return tuple(by_name[name] for name in dict.fromkeys(each.function.name for each in chosen))


@dataclass(frozen=True)
class Call:
    """A tool call that the model made."""

    name: str
    arguments: str
    """A JSON object, as text."""
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex}")

    def body(self) -> ToolCalled:
        """OpenAI's tool call object."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolReader:
    """Splits a growing answer into content and calls. What looks like a call but is not one stays content.

    Holds back whatever may still become a call, and the white space before it. A call whose arguments hold more
    than `MOST_CLOSES` closing tags is not read, and no call after it is.
    """

    def __init__(self) -> None:
        self._held = ""
        self._looked = 0  # in the held text, no call ends before this position
        self._called = False
        self._closes = 0  # closing tags tried for the held call

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Add text; return the content and calls that are certain now."""
        self._held += text
        content, calls = "", []
        while (found := self._next_call()) is not None:
            before, call = found
            content += before
            calls.append(call)
        self._called = self._called or bool(calls)
        return content + self._release(), calls

    def finish(self) -> str:
        """The rest of the content; call it once the answer has ended."""
        rest, self._held = self._held, ""
        return "" if self._called and rest.isspace() else rest

    def _next_call(self) -> tuple[str, Call] | None:
        """Take the next call, and the content before it, from the held text."""
        start = self._held.find(OPEN)
        if start < 0 or self._gave_up:
            return None
        inside = start + len(OPEN)
        # Arguments may contain the closing tag: the call ends at the first one that makes it valid JSON.
        while (end := self._held.find(CLOSE, max(inside, self._looked))) >= 0:
            call = _read(self._held[inside:end])
            self._looked = end + len(CLOSE)
            if call is not None:
                self._closes = 0
                before, self._held, self._looked = self._held[:start].rstrip(), self._held[self._looked :], 0
                return before, call
            self._closes += 1
            if self._closes > MOST_CLOSES:
                return None
        self._looked = max(self._looked, len(self._held) - len(CLOSE))
        return None

    @property
    def _gave_up(self) -> bool:
        return self._closes > MOST_CLOSES

    def _release(self) -> str:
        """Take the content that cannot be part of a call, except trailing white space, from the held text."""
        at = self._held.find(OPEN)
        if self._gave_up:
            at = len(self._held)
        elif at < 0:
            tails = (n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n]))
            at = len(self._held) - next(tails, 0)
        at = len(self._held[:at].rstrip())
        content, self._held = self._held[:at], self._held[at:]
        self._looked = max(0, self._looked - at)
        return content


def _read(text: str) -> Call | None:
    """The call between two tags; None if the text is not a call."""
    try:
        call = json.loads(text)
        if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
            return None
        arguments = json.dumps(call["arguments"], ensure_ascii=False, allow_nan=False)
        return Call(whole_characters(call["name"]), whole_characters(arguments))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # the model wrote something else
