"""The base's tokenizer: text to ids, messages to ids, and ids back to text one token at a time. Torch-free."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nr_serve.errors import BadRequest

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_REPLACEMENT = "�"
_MOST_HELD = 16  # most tokens held back while they give no complete character
_CONTEXT = 6  # prompt tokens kept before the answer: decoders that merge or strip spaces look back a little


class Tokenizer:
    """A thin, typed wrapper of a `transformers` tokenizer."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self._special = frozenset[int](hf.all_special_ids)
        self._texts: dict[int, str] = {}  # log probabilities need the same tokens many times
        self._for_grammars: LLTokenizer | None = None

    @classmethod
    def load(cls, model: str | Path) -> Tokenizer:
        """Load from a local folder or a hub name."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(model))

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Ids of `text`, with the tokenizer's own special tokens (such as BOS) unless told otherwise."""
        ids: list[int] = self.hf.encode(text, add_special_tokens=special_tokens)
        return ids

    def decode(self, ids: Sequence[int], *, special_tokens: bool = False) -> str:
        """Text of `ids`; special tokens are left out unless asked for."""
        text: str = self.hf.decode(
            list(ids), skip_special_tokens=not special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether a token is one of the tokenizer's special tokens, which are left out of an answer's text."""
        return token_id in self._special

    def token_text(self, token_id: int) -> str:
        """The text of one token decoded alone; special tokens by name."""
        if token_id not in self._texts:
            self._texts[token_id] = self.decode([token_id], special_tokens=True)
        return self._texts[token_id]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, even if only a part of a character; special tokens by name."""
        text = self.token_text(token_id)
        if _REPLACEMENT not in text:
            return text.encode()
        token: str = self.hf.convert_ids_to_tokens(token_id)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):  # SentencePiece's byte fallback
            return bytes.fromhex(token[3:5])
        by_letter = _bytes_by_letter()
        return bytes(by_letter[letter] for letter in token) if by_letter.keys() >= set(token) else text.encode()

    def for_grammars(self, vocab_size: int, eos_ids: Sequence[int]) -> LLTokenizer:
        """This tokenizer in the form that grammars need. Made once, which blocks all threads for a second.

        Raises BadRequest if the tokenizer has no fast version, or no token that ends an answer.
        """
        if self._for_grammars is None:
            from llguidance.hf import from_tokenizer

            try:
                self._for_grammars = from_tokenizer(self.hf, n_vocab=vocab_size, eos_token=list(eos_ids))
            except ValueError as error:
                raise BadRequest(f"this base's tokenizer cannot follow a grammar: {error}") from error
        return self._for_grammars

    def as_json(self) -> str:
        """The fast tokenizer's own JSON, for another process; call `for_grammars` first."""
        text: str = self.hf.backend_tokenizer.to_str()
        return text

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The chat template's prompt text for messages and tools.

        `variables` are additional template variables. Raises BadRequest if the template refuses the messages, if
        it does not use the tools or the calls in the messages, or if a variable's name is reserved.
        """
        if variables:
            reserved = inspect.signature(self.hf.apply_chat_template).parameters.keys() | {"self", "messages"}
            taken = sorted(variables.keys() & reserved)
            if taken:
                names = ", ".join(taken)
                raise BadRequest(f"not a variable of chat templates: {names}", param="chat_template_kwargs")
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **variables,
        }
        text = self._templated(messages, tools, options)
        if tools and not self._differs(text, messages, (), options):
            raise BadRequest(
                "`tools` are not supported: this base's chat template does not use them", param="tools"
            )
        calls = any("tool_calls" in message for message in messages)
        if calls and not self._differs(text, _without_calls(messages), tools, options):
            raise BadRequest("this base's chat template does not write `tool_calls`", param="messages")
        return text

    def _differs(
        self,
        text: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> bool:
        """Whether the template gives another text than `text` for these arguments, or refuses them."""
        try:
            return text != self._templated(messages, tools, options)
        except BadRequest:
            return True  # with a part left out, they may no longer be a valid conversation

    def _templated(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> str:
        if not getattr(self.hf, "chat_template", None):
            raise BadRequest("this base has no chat template; use /v1/completions", param="messages")
        try:
            text: str = self.hf.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, **options
            )
        except Exception as error:  # a template is a program: whatever it raises counts as refusal
            raise BadRequest(f"the chat template refused the messages: {error}", param="messages") from error
        return text


@cache
def _bytes_by_letter() -> dict[str, int]:
    """The bytes that the letters of a byte-level vocabulary stand for, as in GPT-2's."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]


def _without_calls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]


class Detokenizer:
    """Turns a growing answer into text, releasing only complete characters.

    `ids[:shown]` have been released, and `out` characters of the text after them. Decoding starts at `start`, a
    little before `shown`, because a token's text can depend on the tokens just before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, special_tokens: bool = False) -> None:
        self._decode = partial(tokenizer.decode, special_tokens=special_tokens)
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._start = 0
        self._shown = len(self._ids)
        self._out = 0

    def push(self, token_id: int) -> str:
        """Add a token; return the text it completes, "" while a character is incomplete."""
        self._ids.append(token_id)
        text = self._new_text()
        whole = text.rstrip(_REPLACEMENT)
        released = whole[self._out :]
        stuck = len(self._ids) - self._shown > _MOST_HELD  # no character is that long: these bytes are not text
        if stuck:
            whole, released = text, text[self._out :]
        if stuck or (text and whole == text):
            self._start, self._shown, self._out = self._shown, len(self._ids), 0
        else:
            self._out = len(whole)
        return released

    def flush(self) -> str:
        """The text still held back, with incomplete characters as U+FFFD."""
        text = self._new_text()[self._out :]
        self._shown, self._out = len(self._ids), 0
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]
