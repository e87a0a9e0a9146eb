"""Target text that other text leads into: a page of the base's own domain, or the opening of a chat.

The base reads a language otherwise after a page of English than at a text's beginning: gates fitted to whole texts
alone open late there, and shut again before a chat's answer.

Shape suffixes: N windows, T tokens per window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from nr_serve.errors import BadRequest
from nr_serve.train.text.frames import Chat, Frames
from nr_serve.train.text.mix import Rotation
from nr_serve.train.text.pack import Windows

PAGES = (0.1, 0.2, 0.4)
"""Shares of a window that the base's own domain takes, in turn."""

QUESTIONS = (0.05, 0.1, 0.2)
"""Shares of a window that the user's words take in a chat, in turn."""


@dataclass(frozen=True)
class GateText:
    """Windows of one class that gates are fitted to."""

    windows: Windows
    own_NT: Tensor
    """How many of the class's own tokens the carry holds at each token; int64 [N, T].

    0 in what leads into them, and at a text's first token, which the carry does not hold.
    """

    @classmethod
    def whole(cls, windows: Windows) -> GateText:
        """Windows of nothing but the class's own text."""
        return cls(windows, windows.offset_NT)


@dataclass(frozen=True)
class _LeadIn:
    before: Sequence[int]
    question: int = 0
    """Number of the target's tokens between `before` and `between`."""
    between: Sequence[int] = ()

    def text(self, own: Sequence[int], length: int) -> Tensor:
        """What it leads into, with it; cut to `length` tokens; int64 [T]."""
        whole = [*self.before, *own[: self.question], *self.between, *own[self.question :]]
        return torch.tensor(whole[:length])


def led_into(target: Windows, original: Mapping[str, Windows], frames: Frames) -> GateText:
    """The windows, every other one continuing a page of original text or a chat's opening, in turn.

    A window that continues something is one text from its first token on; its own text is cut to fit.
    """
    ids_NT, offset_NT, own_NT = target.ids_NT.clone(), target.offset_NT.clone(), target.offset_NT.clone()
    length = ids_NT.shape[1]
    place_T = torch.arange(length)
    for row, lead in zip(range(1, len(target), 2), _lead_ins(length, original, frames), strict=False):
        ids_NT[row] = lead.text(ids_NT[row, len(frames.beginning) :].tolist(), length)
        offset_NT[row] = place_T
        own_NT[row] = (place_T + 1 - len(lead.before)).clamp(min=0)
    return GateText(Windows(ids_NT, offset_NT), own_NT)


def in_chat(windows: Windows, frames: Frames) -> Windows:
    """Each window as one chat: a tenth of it is the user's words, what fits of the rest the assistant's.

    Raises BadRequest if there is no chat template, or if it leaves too little of a window.
    """
    length, chat = windows.ids_NT.shape[1], frames.chat
    if chat is None:
        raise BadRequest("the base has no chat template that can be taken apart", param="chat")
    if not _fits(chat, length):
        raise BadRequest(f"the chat template takes more than half of {length} tokens", param="window")
    lead = _LeadIn(chat.opening, length // 10, chat.between)
    rows = [lead.text(row_T[len(frames.beginning) :].tolist(), length) for row_T in windows.ids_NT]
    return Windows(torch.stack(rows), torch.arange(length).expand(len(rows), length))


def _fits(chat: Chat, length: int) -> bool:
    return len(chat.opening) + len(chat.between) <= length / 2


def _lead_ins(length: int, original: Mapping[str, Windows], frames: Frames) -> Iterator[_LeadIn]:
    """Endless: pages and, if there is a chat template that leaves half a window for the text, chats in turn."""
    pages, chat = Rotation(original.values(), seed=0), frames.chat
    for i in count():
        page = pages.at(i).ids_NT[0].tolist()
        yield _LeadIn(page[: max(1, int(PAGES[i % len(PAGES)] * length))])
        if chat is not None and _fits(chat, length):
            yield _LeadIn(chat.opening, max(1, int(QUESTIONS[i % len(QUESTIONS)] * length)), chat.between)
