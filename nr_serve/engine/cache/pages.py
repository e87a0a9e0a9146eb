"""The KV cache's pages as numbers: who holds which, and which are kept for later. Torch-free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol


class Content(Protocol):
    """What a page that is kept is known by."""

    def forget(self) -> None:
        """The page is about to hold something else."""
        ...


class PagePool:
    """A fixed number of pages of `page_size` tokens each.

    A page is held by any number of requests. One that nobody holds is free; if its content is kept, it is taken
    for something else only when no other page is free, the least recently held first.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.total = pages
        self.page_size = page_size
        self._holders = [0] * pages
        self._empty = list(range(pages - 1, -1, -1))
        self._contents: dict[int, Content] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept and held by nobody, least recently held first

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages somebody holds."""
        return self.total - self.free

    @property
    def kept(self) -> int:
        """Pages whose content is kept."""
        return len(self._contents)

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def take(self, pages: int) -> list[int] | None:
        """So many free pages, or None, taking nothing, if there are not enough."""
        if pages > self.free:
            return None
        taken = [self._empty.pop() if self._empty else self._evict() for _ in range(pages)]
        self.share(taken)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One holder more for each of these pages."""
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)

    def give_back(self, pages: Sequence[int]) -> None:
        """One holder fewer for each of a request's pages, given in the order of its tokens.

        The last goes first, so that nothing is kept longer than what it follows.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0 and page in self._contents:
                self._idle[page] = None
            elif self._holders[page] == 0:
                self._empty.append(page)

    def keep(self, page: int, content: Content) -> None:
        """A page that somebody holds has content that is worth keeping."""
        self._contents[page] = content

    def check(self) -> None:
        """Integrity while nothing runs: every page is empty or kept, once, and not held. Raises RuntimeError."""
        there = {*self._empty, *self._idle}
        if len(there) != self.total:
            raise RuntimeError(f"{self.total - len(there)} of {self.total} pages are lost")
        if self.free != self.total or any(self._holders) or self._idle.keys() != self._contents.keys():
            raise RuntimeError("pages were given back that nobody held, or their contents are lost")

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._contents.pop(page).forget()
        return page
