"""Whether a base calls tools in the form that is read here."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from nr_serve.api.tools import CLOSE, OPEN
from nr_serve.errors import BadRequest
from nr_serve.tokenizer import Tokenizer

_CALL = re.compile(rf'{OPEN}\s*{{\s*"(name|arguments)":')
"""How a call begins. What follows need not be JSON: instructions have placeholders there."""
_FUNCTION = {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}
_ASKED: dict[str, Any] = {"role": "user", "content": "f"}
_CALLED: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}],
}


def check_tools(tokenizer: Tokenizer) -> None:
    """Raise BadRequest if this base would write calls that cannot be read."""
    fault = _fault(tokenizer)
    if fault is not None:
        raise BadRequest(fault, param="tools")


@cache
def _fault(tokenizer: Tokenizer) -> str | None:
    """Why a base with this tokenizer would write calls that cannot be read; None: it would not.

    Its chat template must write a call as it is read here, in its instructions or as one made earlier, and its
    tokenizer must not lose the tags on the way from tokens to text.
    """
    if not any(_CALL.search(_written(tokenizer, messages)) for messages in ([_ASKED], [_ASKED, _CALLED])):
        form = f'{OPEN}{{"name": ..., "arguments": ...}}{CLOSE}'
        return f"`tools` are not supported: this base's chat template does not write calls as {form}"
    if tokenizer.decode(tokenizer.encode(OPEN + CLOSE, special_tokens=False)) != OPEN + CLOSE:
        return f"`tools` are not supported: {OPEN} is no text to this base's tokenizer"
    return None


def _written(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> str:
    """What the template makes of the messages and a tool; "" if it refuses them."""
    tool = {"type": "function", "function": _FUNCTION}
    try:
        return tokenizer.chat_prompt(messages, tools=[tool], add_generation_prompt=False)
    except BadRequest:
        return ""
