"""What a tokenizer puts around text: special tokens such as BOS, and the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nr_serve.train.recipe import BadRecipe

USER, ASSISTANT = "\x02", "\x03"
"""Stand for the two speakers' words while the template is taken apart: no template has these characters."""

WITHOUT = "a recipe leaves chats out with data.chat = false"

DATE = "01 Jan 2026"
"""What templates that take a date, such as Llama 3's, are given, so that a run reads the same text every day."""

_NOW = f"{{% macro strftime_now(format) %}}{DATE}{{% endmacro %}}\n"
"""What templates find in place of transformers' clock. The newline, which the template engine drops, keeps what
follows at the beginning of a line."""


@dataclass(frozen=True)
class Chat:
    """The chat template around one exchange, as token ids."""

    opening: Sequence[int]
    """Before the user's words."""
    between: Sequence[int]
    """Between the user's words and the assistant's."""

    def fits(self, window: int) -> bool:
        """Whether it leaves half of a window of `window` tokens to what is said."""
        return len(self.opening) + len(self.between) <= window / 2


@dataclass(frozen=True)
class Frames:
    """What a tokenizer puts around text, as token ids."""

    beginning: Sequence[int] = ()
    """Before every text."""
    chat: Chat | None = None
    """None without a chat template."""


def find_frames(tokenizer: Any, *, chat: bool) -> Frames:
    """The frames of a Hugging Face tokenizer, those of a chat only if `chat`.

    Raises BadRecipe if the chat template refuses an exchange of user and assistant, or leaves out its words.
    """
    return Frames(text_beginning(tokenizer), _chat(tokenizer) if chat else None)


def text_beginning(tokenizer: Any) -> list[int]:
    """The special tokens, such as BOS, that the tokenizer begins every text with."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    return whole[: whole.index(plain[0])]


def render_exchange(tokenizer: Any, user: str, assistant: str) -> str:
    """One exchange in the tokenizer's chat template."""
    turns: list[Mapping[str, str]] = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
    ]
    template = _NOW + tokenizer.get_chat_template()
    text: str = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, date_string=DATE)
    return text


def _chat(tokenizer: Any) -> Chat | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = render_exchange(tokenizer, USER, ASSISTANT)
    except Exception as error:  # a template is a program: whatever it raises counts as refusal
        raise BadRecipe(f"the base's chat template refuses an exchange: {error}; {WITHOUT}") from error
    opening, user, rest = text.partition(USER)
    between, assistant, _ = rest.partition(ASSISTANT)
    if not (user and assistant):
        raise BadRecipe(f"the base's chat template does not keep what is said in an exchange; {WITHOUT}")
    return Chat(*tokenizer([opening, between], add_special_tokens=False)["input_ids"])  # the template has its own
