"""The scheduler: which tokens of which requests go into the next step. Torch-free.

Every running request that decodes gets one token. Prompts share the rest of the step's token budget, in chunks,
oldest first; while many requests decode, prompts get less of it, because a long step delays every decode. Then
waiting requests are admitted while there is budget, a free row and pages for all their tokens; a request starts
after the tokens that the prefix cache holds. When a decode needs a page and none is free, the last request in
order is preempted: it gives back all its pages and is later computed again from its tokens.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

from nr_serve.engine.cache.neutrality import Opened
from nr_serve.engine.cache.pages import PagePool
from nr_serve.engine.cache.prefix_cache import PrefixCache
from nr_serve.engine.messages import PrefixTokens
from nr_serve.engine.request import Request, TopLogprobs
from nr_serve.errors import NrError

MAX_OVERTAKEN = 64  # requests that may hold a slot longer for which one before them waits
_FEW_DECODES = 8  # beside more of them, prompts get less of a step, down to a quarter


class Admit(Protocol):
    """Fixes a request's selection. Returns False while its adapters are not attached; raises NrError to refuse."""

    def __call__(self, request: Request, *, may_copy: bool) -> bool:
        """With `may_copy`, it may start to attach the request's adapters, which takes idle slots."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, start + count) of one request, fed in this step."""

    request: Request
    start: int
    count: int
    trial: float | None = None
    """Threshold on trial for the one selected adapter, on these tokens only; their gates are not counted."""

    @property
    def samples(self) -> bool:
        """Whether the piece ends with the last known token, so that the next one can be chosen."""
        return self.start + self.count == len(self.request.tokens)

    @property
    def wants_token(self) -> bool:
        """Whether the next token is to be chosen: the piece samples, and not only the prompt was to be scored."""
        return self.samples and self.request.sampling.max_tokens > 0


def spans(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """The range [first, end) of each piece's tokens, with the step's pieces laid end to end."""
    return list(pairwise(accumulate((piece.count for piece in pieces), initial=0)))


@dataclass(frozen=True, slots=True)
class Result:
    """Output of running one piece."""

    token: int | None
    """The next token, if the piece samples and the request wants one."""
    logprob: TopLogprobs | None = None
    """Log probability of `token`, if the request asks for it."""
    prompt_logprobs: tuple[TopLogprobs, ...] = ()
    """Log probabilities of the prompt's tokens [start + 1, start + count + 1), if the request asks for them."""
    fired: tuple[tuple[int, ...], ...] = ()
    """Number of layers whose gate fired, for each token of the piece and each slot, if the request asks for it."""
    opened: tuple[Opened, ...] = ()
    """Which gates opened, for each page that the piece's tokens lie in; empty if none opened."""
    error: NrError | None = None
    """Why there is no token, if this request alone failed."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step's work, and the requests refused while choosing it."""

    pieces: list[Piece]
    refused: list[tuple[Request, NrError]]


class Scheduler:
    """Owns the queue, the running requests, their pages and their rows."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_running: int,
        max_batch_tokens: int,
        admit: Admit,
        delays: Callable[[Request], bool] = lambda request: False,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """`delays`: whether a request would hold a slot that another waits for.

        Without `prefix_cache` every request computes all its tokens.
        """
        self.pool = pool
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self._rows = list(range(max_running - 1, -1, -1))
        self._max_running = max_running
        self._max_batch_tokens = max(max_batch_tokens, max_running)
        self._admit = admit
        self._delays = delays
        self._prefix_cache = prefix_cache

    def add(self, request: Request) -> None:
        """Queue a request by priority, then arrival."""
        insort(self.waiting, request, key=lambda r: r.order)

    def schedule(self) -> Schedule:
        """Choose the next step's pieces, taking pages and rows as needed."""
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
        """Record that the piece's tokens are computed. `opened`: the gates that opened on them, page by page."""
        piece.request.computed = piece.start + piece.count
        if self._prefix_cache is not None:
            self._prefix_cache.advance(piece.request, piece.start, opened)

    def take_prefix_counts(self) -> PrefixTokens:
        """Counts of prefix cache lookups since the last call."""
        return self._prefix_cache.take_counts() if self._prefix_cache is not None else PrefixTokens()

    def drop(self, request: Request) -> None:
        """Remove a request that ended, running or waiting, and take back its pages and row."""
        if request in self.running:
            self.running.remove(request)
            self._take_back(request)
        else:
            self.waiting.remove(request)

    def check(self) -> None:
        """Check that no page or row is lost; call it while nothing runs. Raises RuntimeError."""
        self.pool.check()
        if sorted(self._rows) != list(range(self._max_running)):
            raise RuntimeError("rows of carried state are lost")

    def _prompt_budget(self, decodes: int) -> int:
        """How many prompt tokens a step may hold beside `decodes` decoding requests."""
        whole = self._max_batch_tokens
        if decodes <= _FEW_DECODES:
            return whole - decodes
        return min(whole - decodes, max(whole // 4, whole * _FEW_DECODES // decodes))

    def _chunk(self, request: Request, budget: int) -> Piece:
        return Piece(request, request.computed, min(request.remaining, budget))

    def _grow_decodes(self) -> bool:
        """Give each decoding request a page for its next token; True if a request was preempted for one."""
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
            # Preempted requests may hold the very slot that is waited for: they must go on.
            delays = request.selection is None and self._delays(request)
            if blocked is not None and delays and blocked.overtaken >= MAX_OVERTAKEN:
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
                blocked.overtaken += delays
            pieces.append(self._chunk(request, budget))
            budget -= pieces[-1].count
        return refused

    def _start(self, request: Request) -> bool:
        """Give an admitted request its pages and a row; with too few pages, give nothing and return False."""
        matched = self._prefix_cache.match(request) if self._prefix_cache is not None else []
        shared = [record.page for record in matched]
        self.pool.share(shared)
        pages = self.pool.take(self.pool.needed(len(request.tokens)) - len(shared))
        if pages is None:
            self.pool.give_back(shared)
            return False
        self.waiting.remove(request)
        request.pages = shared + pages
        request.row = self._rows.pop()
        if self._prefix_cache is not None:
            self._prefix_cache.begin(request, matched)
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
