"""The page allocator: which KV pages are free, which are in use and by how many, which are kept for reuse.

A page holds `page_size` consecutive tokens of one sequence, for every layer. Ids are drawn from a half-open
range:

    [0, 1)          the null page: padding writes to it, nobody owns it, it is never allocated
    [1, num_pages)  every page here is in exactly one of three states
                      free    refcount 0, contents meaningless
                      used    refcount = number of sequences whose page table names it
                      cached  refcount 0, but kept: its contents can be found again until it is evicted

Only `allocate` and `retain` raise a refcount, only `release` lowers it. Only a kept page can be retained, so
a page with more than one user is, or was until `forget`, a kept one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from jinfer.errors import ConfigError, JinferError

NULL_PAGE = 0


class IntegrityError(JinferError, AssertionError):
    """The bookkeeping contradicts itself: a bug in the engine, never the user's fault."""


def require(condition: bool, message: str) -> None:
    """Raises IntegrityError. Unlike `assert` it also checks under `python -O`."""
    if not condition:
        raise IntegrityError(message)


class PagePool:
    """Refcounts and the least-recently-used order of kept pages. Every operation is O(pages it names).

    `on_evict(page)` is called when a kept page is about to be reused for something else.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ConfigError(f"the KV pool has {num_pages} pages, expected at least 2: page 0 is never used")
        self.num_pages = num_pages
        self.on_evict: Callable[[int], None] = lambda page: None
        # A stack: the page freed last is reused first (its memory is the most likely to be warm).
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._refcounts = [0] * num_pages
        self._is_kept = [False] * num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_total(self) -> int:
        """Pages that can be allocated at all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Kept pages that no sequence uses now."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out: free ones, and cached ones by evicting them."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - len(self._free) - len(self._cached)

    def refcount(self, page: int) -> int:
        return self._refcounts[page]

    def is_kept(self, page: int) -> bool:
        return self._is_kept[page]

    def allocate(self, count: int) -> list[int]:
        """`count` pages with refcount 1; free ones first, then the least recently used cached ones.

        The caller has checked `num_available`; asking for more is an IntegrityError and changes nothing.
        """
        if count > self.num_available:
            raise IntegrityError(f"{count} pages asked, {self.num_available} available: check before")
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._is_kept[page] = False
                self.on_evict(page)
            self._refcounts[page] = 1
            pages.append(page)
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more sequence uses these kept pages."""
        for page in pages:
            if not self._is_kept[page]:
                raise IntegrityError(f"page {page} is private and cannot be shared")
            if self._refcounts[page] == 0:
                del self._cached[page]
            self._refcounts[page] += 1

    def release(self, pages: Iterable[int], *, evict_first: bool = False) -> None:
        """One sequence less uses these pages.

        Order matters: what is released first is evicted first, so a sequence gives its pages back from its
        end, and a chain of cached pages loses its leaves before its root. evict_first: they go before all others.
        """
        for page in pages:
            count = self._refcounts[page] - 1
            if count < 0:
                raise IntegrityError(f"page {page} is released more often than it was taken")
            self._refcounts[page] = count
            if count == 0:
                if self._is_kept[page]:
                    self._cached[page] = None
                    if evict_first:
                        self._cached.move_to_end(page, last=False)
                else:
                    self._free.append(page)

    def keep(self, page: int) -> None:
        """Marks a used page: when its last user leaves, it is cached instead of freed."""
        require(self._refcounts[page] > 0, f"page {page} is not in use, so its contents mean nothing")
        self._is_kept[page] = True

    def forget(self, page: int) -> None:
        """Undoes `keep`: freed at once if no sequence uses it, else when its last user leaves."""
        self._is_kept[page] = False
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless free, used and cached pages are disjoint and make up the pool."""
        free, cached = set(self._free), set(self._cached)
        used = {page for page, count in enumerate(self._refcounts) if count > 0}
        require(len(free) == len(self._free), "a page is free twice")
        require(not free & cached and not free & used and not cached & used, "a page is in two states")
        require(
            free | cached | used == set(range(1, self.num_pages)), "a page is lost, or the null page is owned"
        )
        require(min(self._refcounts) >= 0, "a refcount is negative")
        for page in free:
            require(not self._is_kept[page], f"page {page} is free and kept")
        for page in cached:
            require(self._is_kept[page], f"page {page} is cached but not kept")
