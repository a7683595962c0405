"""How many pages each group gets from one budget of bytes.

Sequences of equal length fill all pools at the same time: with room for `num_seqs` of them the split is the one for the
longest length at which they all fit. Short of a window they need equally many pages in every group; beyond it a windowed
group needs no more, and what is left goes to the full one. Whatever the budget, one sequence of `max_tokens` must fit.

A cached prefix is of use only with its last window. Sequences that ended leave room in a full pool, because few of them
have their full length; a windowed pool, which all sequences use alike, gets room for theirs on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinfer.cache.groups import most_pages, pages_of


@dataclass(frozen=True)
class Need:
    """A group's window and the bytes of one page in all its layers."""

    window: int | None
    page_bytes: int


@dataclass(frozen=True)
class Budget:
    """What is to be shared: the groups, tokens per page, tokens of the largest step, sequences that run at once, and
    windows of those that ended that should stay for the prefix cache."""

    needs: Sequence[Need]
    page_size: int
    chunk: int
    num_seqs: int
    num_cached: int = 0

    def least(self, need: Need, tokens: int) -> int:
        """Pages of one sequence alone, whose prompt may be computed in the largest chunks; the null page included."""
        return most_pages(tokens, need.window, self.page_size, self.chunk) + 1

    def most(self, need: Need, tokens: int) -> int:
        """Pages of `num_seqs` sequences of that length, and in a windowed group `num_cached` windows more."""
        whole = self.num_seqs * pages_of(tokens, self.page_size) + 1
        if need.window is None:
            return whole
        # Of all prompts one at a time is in the middle of being computed, and holds a chunk more than its window.
        decoding = most_pages(tokens, need.window, self.page_size, 1)
        windows = (self.num_seqs + self.num_cached) * decoding
        return min(whole, windows + self.least(need, tokens) - decoding)

    def bytes_of(self, pages: Sequence[int]) -> int:
        return sum(count * need.page_bytes for count, need in zip(pages, self.needs, strict=True))

    def all_slots(self, max_tokens: int) -> list[int]:
        """Pages per group with which every slot can have a sequence of `max_tokens`."""
        return [self.most(need, max_tokens) for need in self.needs]

    def one_sequence(self, tokens: int) -> list[int]:
        return [self.least(need, tokens) for need in self.needs]

    def longest(self, pages: Sequence[int], max_tokens: int) -> int:
        """The most tokens, max_tokens or less, that one sequence can have with so many pages per group."""

        def fits(tokens: int) -> bool:
            return all(have >= least for have, least in zip(pages, self.one_sequence(tokens), strict=True))

        return max_tokens if fits(max_tokens) else self._largest(fits, max_tokens)

    def longest_of(self, budget: int, max_tokens: int) -> int:
        """The same, of a budget of bytes."""

        def fits(tokens: int) -> bool:
            return self.bytes_of(self.one_sequence(tokens)) <= budget

        return max_tokens if fits(max_tokens) else self._largest(fits, max_tokens)

    def _largest(self, fits, max_tokens: int) -> int:
        """The largest multiple of the page size up to max_tokens that fits; 0 if none does."""
        low, high = 0, max_tokens // self.page_size
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle * self.page_size) else (low, middle - 1)
        return low * self.page_size

    def split(self, budget: int, max_tokens: int) -> list[int]:
        """Pages per group, null pages included; one sequence of max_tokens fits into `budget` bytes."""

        def pages_at(tokens: int) -> list[int]:
            return [max(self.most(need, tokens), self.least(need, max_tokens)) for need in self.needs]

        pages = pages_at(max_tokens)
        total = self.bytes_of(pages)
        if total <= budget:
            return [count * budget // total for count in pages]
        length = self._largest(lambda tokens: self.bytes_of(pages_at(tokens)) <= budget, max_tokens)
        pages = pages_at(length) if length else self.one_sequence(max_tokens)
        # What is less than a page for every sequence goes to the group that grows with their length.
        place = next((i for i, need in enumerate(self.needs) if need.window is None), 0)
        pages[place] += (budget - self.bytes_of(pages)) // self.needs[place].page_bytes
        return pages

    def fraction(self, tokens: int) -> float:
        """Bytes that a sequence of that length holds, as a share of what it held if no group had a window."""
        held = [most_pages(tokens, need.window, self.page_size, 1) for need in self.needs]
        whole = [pages_of(tokens, self.page_size)] * len(self.needs)
        return self.bytes_of(held) / self.bytes_of(whole)
