"""Text that other text leads into: a page of the base's own domain, or the opening of a chat.

The base reads a language otherwise after a page of English than at a text's beginning: gates fitted to whole texts
alone open late there, and shut again before a chat's answer.

Shape suffixes: N windows, T tokens per window.
"""

from __future__ import annotations

import random
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
"""Shares of a window that the base's own domain takes."""

QUESTIONS = (0.05, 0.1, 0.2)
"""Shares of a window that the user's words take in a chat."""


@dataclass(frozen=True)
class GateText:
    """Windows of one class that gates are fitted to."""

    windows: Windows
    own_NT: Tensor
    """How many tokens the carry holds from the class's own first one on; int64 [N, T].

    0 in what leads into it, and at a text's first token, which the carry does not hold.
    """

    @classmethod
    def whole(cls, windows: Windows) -> GateText:
        """Windows of nothing but the class's own text."""
        return cls(windows, windows.offset_NT)


@dataclass(frozen=True)
class _LeadIn:
    """What a document continues, and what is put into it."""

    before: Sequence[int]
    question: int = 0
    """Number of the document's tokens between `before` and `between`."""
    between: Sequence[int] = ()

    def apply(self, windows: Windows, row: int, skip: int) -> tuple[Tensor, Tensor, Tensor]:
        """A window whose first document continues `before`: ids, offsets, and tokens since `before`; each [T].

        The document's first `skip` tokens are left out, and so is what no longer fits at the window's end.
        """
        ids, offsets = windows.ids_NT[row].tolist(), windows.offset_NT[row].tolist()
        end = _first_document(offsets)
        document, rest = self.around(ids[:end], skip), ids[end:]
        places = [*range(len(document)), *offsets[end:]]
        since = [*(max(0, place + 1 - len(self.before)) for place in range(len(document))), *offsets[end:]]
        length = len(ids)
        columns = ([*document, *rest][:length], places[:length], since[:length])
        ids_T, offset_T, since_T = (torch.tensor(column) for column in columns)
        return ids_T, offset_T, torch.minimum(since_T, offset_T)

    def around(self, document: Sequence[int], skip: int) -> list[int]:
        """A document that continues `before`, without its first `skip` tokens, or as many as `before` has."""
        own = document[min(skip, len(self.before)) :]
        return [*self.before, *own[: self.question], *self.between, *own[self.question :]]


def _first_document(offsets: Sequence[int]) -> int:
    """Number of tokens of a window's first document."""
    return next((i for i, offset in enumerate(offsets) if i and not offset), len(offsets))


def _documents(windows: Windows, row: int) -> Iterator[list[int]]:
    """The ids of each document of a window."""
    ids, offsets = windows.ids_NT[row].tolist(), windows.offset_NT[row].tolist()
    while ids:
        end = _first_document(offsets)
        yield ids[:end]
        ids, offsets = ids[end:], offsets[end:]


def led_into(own: Windows, original: Mapping[str, Windows], frames: Frames) -> GateText:
    """The windows, every other one continuing a page of original text or a chat's opening, in turn.

    Only a window's first document continues something, without the tokenizer's beginning.
    """
    columns = [[*windows_NT] for windows_NT in (own.ids_NT, own.offset_NT, own.offset_NT)]
    lead_ins = _lead_ins(own.ids_NT.shape[1], original, frames)
    for row, lead_in in zip(range(1, len(own), 2), lead_ins, strict=False):
        applied = lead_in.apply(own, row, len(frames.beginning))
        for column, made_T in zip(columns, applied, strict=True):
            column[row] = made_T
    ids_NT, offset_NT, own_NT = (torch.stack(column) for column in columns)
    return GateText(Windows(ids_NT, offset_NT), own_NT)


def in_chat(windows: Windows, frames: Frames) -> Windows:
    """Each window's documents as chats: a tenth of each is the user's words, the rest the assistant's.

    What no longer fits at a window's end is left out. Raises BadRequest if there is no chat template, or if it
    takes more than half of a window.
    """
    length = windows.ids_NT.shape[1]
    chat = check_chat(frames, length)
    skip = min(len(frames.beginning), len(chat.opening))
    ids_NT, offset_NT = torch.empty_like(windows.ids_NT), torch.empty_like(windows.offset_NT)
    for row in range(len(windows)):
        ids: list[int] = []
        places: list[int] = []
        for document in _documents(windows, row):
            question = _share(len(document) - skip, 0.1)
            made = _LeadIn(chat.opening, question, chat.between).around(document, skip)
            ids += made
            places += range(len(made))
        ids_NT[row], offset_NT[row] = torch.tensor(ids[:length]), torch.tensor(places[:length])
    return Windows(ids_NT, offset_NT)


def check_chat(frames: Frames, window: int) -> Chat:
    """The chat template; raises BadRequest as `in_chat` does."""
    if frames.chat is None:
        raise BadRequest("the base has no chat template", param="chat")
    if not frames.chat.fits(window):
        raise BadRequest(f"the chat template takes more than half of {window} tokens", param="window")
    return frames.chat


def _lead_ins(length: int, original: Mapping[str, Windows], frames: Frames) -> Iterator[_LeadIn]:
    """Endless: pages and, if there is a chat template that leaves room, chats in turn."""
    pages, draw, chat = Rotation(original.values(), seed=0), random.Random(0), frames.chat
    for i in count():
        page = pages.at(i)
        ids, end = page.ids_NT[0].tolist(), _first_document(page.offset_NT[0].tolist())
        yield _LeadIn(ids[: min(end, _share(length, draw.choice(PAGES)))])
        if chat is not None and chat.fits(length):
            yield _LeadIn(chat.opening, _share(length, draw.choice(QUESTIONS)), chat.between)


def _share(length: int, share: float) -> int:
    return max(1, int(share * length))
