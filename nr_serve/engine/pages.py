"""The KV cache's pages as numbers: which are free, which are taken. Torch-free."""

from __future__ import annotations


class PagePool:
    """A fixed number of pages of `page_size` tokens each."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.total = pages
        self.page_size = page_size
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages somebody holds."""
        return self.total - self.free

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def take(self, pages: int) -> list[int] | None:
        """So many free pages, or None, taking nothing, if there are not enough."""
        if pages > self.free:
            return None
        return [self._free.pop() for _ in range(pages)]

    def give_back(self, pages: list[int]) -> None:
        """Return pages that were taken."""
        self._free.extend(pages)

    def check(self) -> None:
        """Integrity while nothing runs: every page is free, once. Raises RuntimeError."""
        if len(self._free) != self.total or len(set(self._free)) != self.total:
            raise RuntimeError(f"{self.total - len(set(self._free))} of {self.total} pages are lost")
