"""Checks whether a base writes tool calls in the format that this server reads."""

from __future__ import annotations

import re
from typing import Any

from nr_serve.api.tools import CLOSE, OPEN
from nr_serve.errors import BadRequest
from nr_serve.tokenizer import Tokenizer

_CALL = re.compile(rf'{OPEN}\s*{{\s*"(name|arguments)":')
"""How a call begins. The rest need not be JSON: a template's instructions have placeholders there."""
_FUNCTION = {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}
_ASKED: dict[str, Any] = {"role": "user", "content": "f"}
_CALLED: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}],
}


def tool_fault(tokenizer: Tokenizer) -> str | None:
    """Why a base with this tokenizer would write calls that cannot be read; None if it would not.

    The chat template must write calls in the expected format, in its instructions or for an earlier call. The
    tokenizer must keep the call tags when decoding.
    """
    if not any(_CALL.search(_written(tokenizer, messages)) for messages in ([_ASKED], [_ASKED, _CALLED])):
        form = f'{OPEN}{{"name": ..., "arguments": ...}}{CLOSE}'
        return f"`tools` are not supported: this base's chat template does not write calls as {form}"
    if tokenizer.decode(tokenizer.encode(OPEN + CLOSE, special_tokens=False)) != OPEN + CLOSE:
        return f"`tools` are not supported: this base's tokenizer does not keep {OPEN} as text"
    return None


def _written(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> str:
    """The template's text for the messages and a tool; "" if the template refuses them."""
    tool = {"type": "function", "function": _FUNCTION}
    try:
        return tokenizer.chat_prompt(messages, tools=[tool], add_generation_prompt=False)
    except BadRequest:
        return ""
