"""The KV cache's pages as numbers: who holds which, and which are kept for later. Torch-free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol


class Content(Protocol):
    """Identifies what a kept page holds."""

    def forget(self) -> None:
        """Called when the page is about to hold something else."""
        ...


class PagePool:
    """A fixed number of pages of `page_size` tokens each.

    A page may be held by any number of requests. A page that nobody holds is free. A free page whose content is
    kept is evicted only when there is no other free page, the least recently held first.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.total = pages
        self.page_size = page_size
        self._holders = [0] * pages
        self._empty = list(range(pages - 1, -1, -1))
        self._contents: dict[int, Content] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept, held by nobody; least recently held first

    @property
    def free(self) -> int:
        """Number of pages that nobody holds."""
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        """Number of pages that somebody holds."""
        return self.total - self.free

    @property
    def kept(self) -> int:
        """Number of pages whose content is kept."""
        return len(self._contents)

    def needed(self, tokens: int) -> int:
        """Number of pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def take(self, pages: int) -> list[int] | None:
        """Take that many free pages; None, taking nothing, if there are not enough."""
        if pages > self.free:
            return None
        taken = [self._empty.pop() if self._empty else self._evict() for _ in range(pages)]
        self.share(taken)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Add one holder to each of these pages."""
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)

    def give_back(self, pages: Sequence[int]) -> None:
        """Remove one holder from each of a request's pages, given in the order of its tokens.

        The last page is given back first, so that no page is kept longer than the one before it.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0 and page in self._contents:
                self._idle[page] = None
            elif self._holders[page] == 0:
                self._empty.append(page)

    def keep(self, page: int, content: Content) -> None:
        """Keep the content of a page that somebody holds."""
        self._contents[page] = content

    def check(self) -> None:
        """Check, while nothing runs, that every page is empty or kept, and held by nobody. Raises RuntimeError."""
        there = {*self._empty, *self._idle}
        if len(there) != self.total:
            raise RuntimeError(f"{self.total - len(there)} of {self.total} pages are lost")
        if self.free != self.total or any(self._holders) or self._idle.keys() != self._contents.keys():
            raise RuntimeError("pages were given back that nobody held, or their contents are lost")

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._contents.pop(page).forget()
        return page
