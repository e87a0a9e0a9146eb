"""The scheduler: which tokens of which requests go into the next step. Torch-free.

Every running request that decodes gets its one token; prompts get what is left of the step's token budget, or less
where many decodes would wait for them, in chunks, oldest first; then waiting requests are admitted while there is
budget, a row and pages for all their tokens. They start after the tokens that the prefix cache has. When a decode
needs a page and none is free, the request that comes last is preempted: it gives everything back and is computed
again from its tokens later.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

from nr_serve.engine.cache.neutrality import Opened
from nr_serve.engine.cache.pages import PagePool
from nr_serve.engine.cache.reuse import Reuse
from nr_serve.engine.messages import PrefixTokens
from nr_serve.engine.request import Request, TopLogprobs
from nr_serve.errors import NrError

MAX_OVERTAKEN = 64  # requests that may go before one that waits for a slot
_FEW_DECODES = 8  # beside more of them, prompts get less of a step, down to a quarter


class Admit(Protocol):
    """Fixes a request's selection; False while its adapters are not attached. Raises NrError to refuse it."""

    def __call__(self, request: Request, *, may_copy: bool) -> bool:
        """With `may_copy` it may set about attaching them, taking slots that are idle."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, start + count) of one request, fed in this step."""

    request: Request
    start: int
    count: int
    trial: float | None = None
    """Threshold on trial: that of the one adapter selected, on these tokens alone, which are not counted."""

    @property
    def samples(self) -> bool:
        """Whether the piece ends with the last known token, so that the next one can be chosen."""
        return self.start + self.count == len(self.request.tokens)


def spans(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Tokens [first, end) of a step that are each piece's, laid end to end."""
    return list(pairwise(accumulate((piece.count for piece in pieces), initial=0)))


@dataclass(frozen=True, slots=True)
class Result:
    """What running a piece gave."""

    token: int | None
    """The next token, if the piece samples and the request wants one."""
    logprob: TopLogprobs | None = None
    """Of that token, if asked for."""
    prompt_logprobs: tuple[TopLogprobs, ...] = ()
    """Of the prompt's tokens [start + 1, start + count + 1), if asked for."""
    fired: tuple[tuple[int, ...], ...] = ()
    """Layers fired, for each token of the piece by slot, if asked for."""
    opened: tuple[Opened, ...] = ()
    """Gates that opened, for each page that the piece's tokens lie in; empty if none did."""
    error: NrError | None = None
    """Why there is no token, if something went wrong with this request alone."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step's work, and the requests that were refused on the way."""

    pieces: list[Piece]
    refused: list[tuple[Request, NrError]]


class Scheduler:
    """Owns the queue, the running requests, their pages and their rows."""

    def __init__(
        self, pool: PagePool, *, max_running: int, max_batch_tokens: int, admit: Admit, reuse: Reuse | None = None
    ) -> None:
        """Without `reuse` every request computes all its tokens."""
        self.pool = pool
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self._rows = list(range(max_running - 1, -1, -1))
        self._max_running = max_running
        self._max_batch_tokens = max(max_batch_tokens, max_running)
        self._admit = admit
        self._reuse = reuse

    def add(self, request: Request) -> None:
        """Queue a request by priority, then arrival."""
        insort(self.waiting, request, key=lambda r: r.order)

    def schedule(self) -> Schedule:
        """Choose the next step's pieces; takes pages and rows as needed."""
        preempted = self._grow_decodes()
        pieces = [Piece(r, r.computed, 1) for r in self.running if r.remaining == 1]
        budget = self._prompt_budget(len(pieces))
        for request in self.running:
            if request.remaining > 1 and budget > 0:
                pieces.append(self._chunk(request, budget))
                budget -= pieces[-1].count
        refused = [] if preempted else self._admit_waiting(pieces, budget)
        return Schedule(pieces, refused)

    def advance(self, piece: Piece, opened: Sequence[Opened] = ()) -> None:
        """The piece's tokens are computed, and these gates opened on them, page by page."""
        piece.request.computed = piece.start + piece.count
        if self._reuse is not None:
            self._reuse.advance(piece.request, piece.start, opened)

    def take_prefix_counts(self) -> PrefixTokens:
        """What was looked up in the prefix cache since the last time."""
        return self._reuse.take_counts() if self._reuse is not None else PrefixTokens()

    def drop(self, request: Request) -> None:
        """The request ended, wherever it was: take everything back."""
        if request in self.running:
            self.running.remove(request)
            self._take_back(request)
        else:
            self.waiting.remove(request)

    def check(self) -> None:
        """Integrity while nothing runs. Raises RuntimeError."""
        self.pool.check()
        if sorted(self._rows) != list(range(self._max_running)):
            raise RuntimeError("rows of carried state are lost")

    def _prompt_budget(self, decodes: int) -> int:
        """Tokens of prompts that so many decodes may be held up by."""
        whole = self._max_batch_tokens
        if decodes <= _FEW_DECODES:
            return whole - decodes
        return min(whole - decodes, max(whole // 4, whole * _FEW_DECODES // decodes))

    def _chunk(self, request: Request, budget: int) -> Piece:
        return Piece(request, request.computed, min(request.remaining, budget))

    def _grow_decodes(self) -> bool:
        """Give each decoding request a page for its next token; True if somebody was preempted for it."""
        before = self.preemptions
        for request in list(self.running):
            while request in self.running and len(request.pages) < self.pool.needed(len(request.tokens)):
                page = self.pool.take(1)
                if page is not None:
                    request.pages += page
                else:
                    self._preempt(self.running[-1])
        return self.preemptions > before

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._take_back(request)
        request.computed = 0
        self.preemptions += 1
        self.add(request)

    def _admit_waiting(self, pieces: list[Piece], budget: int) -> list[tuple[Request, NrError]]:
        refused = []
        blocked: Request | None = None
        for request in list(self.waiting):
            if budget <= 0 or not self._rows:
                break
            if blocked is not None and not _may_overtake(request, blocked):
                continue
            try:
                admitted = self._admit(request, may_copy=blocked is None)
            except NrError as error:
                refused.append((request, error))
                self.waiting.remove(request)
                continue
            if not admitted:
                blocked = blocked or request
                continue
            if not self._start(request):
                break
            if blocked is not None:
                blocked.overtaken += 1
            pieces.append(self._chunk(request, budget))
            budget -= pieces[-1].count
        return refused

    def _start(self, request: Request) -> bool:
        """Give an admitted request its pages and a row; False, giving nothing, if there are too few pages."""
        matched = self._reuse.match(request) if self._reuse is not None else []
        shared = [record.page for record in matched]
        self.pool.share(shared)
        pages = self.pool.take(self.pool.needed(len(request.tokens)) - len(shared))
        if pages is None:
            self.pool.give_back(shared)
            return False
        self.waiting.remove(request)
        request.pages = shared + pages
        request.row = self._rows.pop()
        if self._reuse is not None:
            self._reuse.begin(request, matched)
        if request.started is None:
            request.started, request.cached_tokens = time.monotonic(), request.reused
        insort(self.running, request, key=lambda r: r.order)
        return True

    def _take_back(self, request: Request) -> None:
        self.pool.give_back(request.pages)
        request.pages, request.chain = [], None
        assert request.row is not None
        self._rows.append(request.row)
        request.row = None


def _may_overtake(request: Request, blocked: Request) -> bool:
    """Whether `request` may be admitted before `blocked`, which waits for its adapters to get slots.

    The base alone needs no slot, and preempted requests may hold the very slot that is waited for. Others may
    keep slots busy, so only so many of them go first: the waiting one must get its turn.
    """
    needs_no_slot = request.submit.adapters == () or request.selection is not None
    return needs_no_slot or blocked.overtaken < MAX_OVERTAKEN
