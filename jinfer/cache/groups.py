"""Page groups: layers that need the same keys share page ids, a pool and a table; layers with a window keep less.

A layer with a sliding window W lets the query at position p see the keys (p - W, p]. So before tokens from `start` on
are computed, a windowed group needs only the pages that hold positions from start - W + 1 on:

    page     0     1     2     3     4     5
           [.....|.....|..xxx|xxxxx|xxx..|.....)      page_size 5, W 12, start 23: x are the keys still seen
            released    held

Pages of all groups have the same number of tokens, so the tables of a sequence end at the same page, and a page's key
(see `prefix`) is the same in every group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinfer.cache.pages import PagePool
from jinfer.cache.prefix import PrefixCache


def pages_of(num_tokens: int, page_size: int) -> int:
    """Pages that hold so many tokens from the first one on."""
    return -(-num_tokens // page_size)


def first_page(start: int, window: int | None, page_size: int) -> int:
    """The first page that tokens from position `start` on can see; those before it are not needed any more."""
    return 0 if window is None else max(0, start - window + 1) // page_size


def window_pages(window: int, page_size: int, chunk: int) -> int:
    """The most pages that `chunk` tokens and the window - 1 tokens before them touch, wherever in a page they begin."""
    return (window + chunk + page_size - 3) // page_size + 1


def most_pages(num_tokens: int, window: int | None, page_size: int, chunk: int) -> int:
    """The most pages that a sequence of `num_tokens` tokens holds at once, computed `chunk` at a time at most.

    Decoding is a chunk of 1.
    """
    whole = pages_of(num_tokens, page_size)
    return whole if window is None else min(whole, window_pages(window, page_size, chunk))


@dataclass(frozen=True)
class GroupSize:
    """What the scheduler knows of a group: its pages (the null page included), its window, how many layers it has."""

    num_pages: int
    window: int | None = None
    num_layers: int = 1


class PageGroup:
    """One group's pool and prefix cache, and what of the pool is spoken for.

    reserved: pages promised to prompts that are being computed, not taken yet.
    held: pages that the sequences hold, a shared one counted for each.

    Without a window a sequence keeps every page until it ends, so a shared page is one page less to promise. A windowed
    group promises a prompt only the pages that it holds at once, counting on those that it gives back as it advances;
    one that others share would not come back. There every holder is charged for every page.
    """

    def __init__(self, size: GroupSize, page_size: int, chunk: int) -> None:
        self.window, self.num_layers, self.page_size = size.window, size.num_layers, page_size
        self.pool = PagePool(size.num_pages)
        self.cache = PrefixCache(self.pool)
        self.chunk = chunk
        self.reserved = 0
        self.held = 0

    @property
    def num_unclaimed(self) -> int:
        """Pages that anyone may take now."""
        if self.window is None:
            return self.pool.num_available - self.reserved
        return self.pool.num_total - self.held - self.reserved

    @property
    def capacity_tokens(self) -> int | None:
        """Tokens whose KV one sequence alone can have here; None: any number, since the window's pages suffice."""
        total = self.pool.num_total
        if self.window is not None and window_pages(self.window, self.page_size, self.chunk) <= total:
            return None
        return total * self.page_size

    def first_page(self, start: int) -> int:
        """See the function of this name."""
        return first_page(start, self.window, self.page_size)

    def prefill_pages(self, start: int, end: int) -> int:
        """The most pages that are held at once while the tokens [start, end) are computed in chunks."""
        most = most_pages(end, self.window, self.page_size, self.chunk)
        return min(pages_of(end, self.page_size) - self.first_page(start), most)

    def decode_pages(self, num_tokens: int) -> int:
        """The most pages that are held at once while decoding up to so many tokens."""
        return most_pages(num_tokens, self.window, self.page_size, 1)


def capacity_tokens(groups: Sequence[PageGroup]) -> int | None:
    """Tokens whose KV one sequence alone can have in every group; None: any number."""
    limits = [limit for group in groups if (limit := group.capacity_tokens) is not None]
    return min(limits, default=None)
