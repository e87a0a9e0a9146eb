"""The prefix cache: what requests take from it when they start, and add to it as their pages fill. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from nr_serve.engine.cache.neutrality import NOTHING, Attachments, Opened
from nr_serve.engine.cache.pages import PagePool
from nr_serve.engine.cache.prefix_tree import Chain, PrefixTree, Record
from nr_serve.engine.messages import PrefixTokens
from nr_serve.engine.request import Request


class PrefixCache:
    """Lets requests begin with pages that other requests computed, where that is exact."""

    def __init__(self, pool: PagePool, attachments: Attachments) -> None:
        self.tree = PrefixTree(pool)
        self._pool = pool
        self._attachments = attachments
        self._counted = PrefixTokens()

    def match(self, request: Request) -> list[Record]:
        """The pages of the prefix cache that an admitted request may begin with.

        There are none if the answer reports on the prompt's tokens: a report needs each token to be computed.
        """
        if request.reports_prompt:
            return []
        return self.tree.match(request.tokens, request.submit.cache_salt, self._selection(request))

    def begin(self, request: Request, matched: Sequence[Record]) -> None:
        """Start a request with the matched pages: it computes the tokens after them."""
        request.computed = request.reused = len(matched) * self._pool.page_size
        request.chain = self.tree.begin(matched, self._attachments.all)
        if not request.reports_prompt:
            self._count(request, matched)

    def advance(self, request: Request, start: int, opened: Sequence[Opened]) -> None:
        """Put the pages filled by tokens [start, computed) into the cache.

        `opened` has one entry for each page that these tokens lie in; it is empty if no gate opened.
        """
        size = self._pool.page_size
        for i, page in enumerate(range(start // size, self._pool.needed(request.computed))):
            chain = request.chain
            if chain is None:
                return
            self._extend(chain, opened[i] if opened else NOTHING)
            end = (page + 1) * size
            if not chain.footprint.serves_some:
                request.chain = None
            elif end <= request.computed:
                self._add(request, chain, page, end)

    def take_counts(self) -> PrefixTokens:
        """Counts of lookups since the last call."""
        counted, self._counted = self._counted, PrefixTokens()
        return counted

    def _extend(self, chain: Chain, opened: Opened) -> None:
        of = self._attachments
        acted = frozenset(of[slot] for slot in opened.acted)
        would_act = frozenset(of[slot] for slot in opened.would_act)
        chain.footprint = chain.footprint.then(of.all, acted, would_act)

    def _add(self, request: Request, chain: Chain, page: int, end: int) -> None:
        tokens, salt = request.tokens[end - self._pool.page_size : end], request.submit.cache_salt
        request.pages[page] = self.tree.add(chain, tokens, request.pages[page], salt, self._selection(request))

    def _selection(self, request: Request) -> frozenset[int]:
        return self._attachments.of(request.selection or ())

    def _count(self, request: Request, matched: Sequence[Record]) -> None:
        selection, size = self._selection(request), self._pool.page_size
        neutral = sum(record.selection != selection for record in matched)
        now = self._counted
        self._counted = PrefixTokens(
            now.asked + len(request.tokens), now.found + len(matched) * size, now.neutral + neutral * size
        )
