"""What a tokenizer puts around text: special tokens such as BOS, and the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

USER, ASSISTANT = "\x02", "\x03"
"""Stand for the two speakers' words while the template is taken apart: no template has these characters."""


@dataclass(frozen=True)
class Chat:
    """The chat template around one exchange, as token ids."""

    opening: Sequence[int]
    """Before the user's words."""
    between: Sequence[int]
    """Between the user's words and the assistant's."""


@dataclass(frozen=True)
class Frames:
    """What a tokenizer puts around text, as token ids."""

    beginning: Sequence[int] = ()
    """Before every text."""
    chat: Chat | None = None
    """None if the tokenizer has no chat template, or if it does not keep the speakers' words in order."""


def find_frames(tokenizer: Any, *, chat: bool) -> Frames:
    """The frames of a Hugging Face tokenizer, those of a chat only if `chat`."""
    has_chat = chat and getattr(tokenizer, "chat_template", None)
    return Frames(beginning(tokenizer), _chat(tokenizer) if has_chat else None)


def beginning(tokenizer: Any) -> list[int]:
    """The special tokens, such as BOS, that the tokenizer begins every text with."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    return whole[: whole.index(plain[0])]


def _chat(tokenizer: Any) -> Chat | None:
    turns = [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}]
    opening, user, rest = tokenizer.apply_chat_template(turns, tokenize=False).partition(USER)
    between, assistant, _ = rest.partition(ASSISTANT)
    if not (user and assistant):
        return None
    ids = tokenizer([opening, between], add_special_tokens=False)["input_ids"]  # the template has its own
    return Chat(*ids)
