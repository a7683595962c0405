"""The scheduler's own record of a request: what it holds and what it may still do."""

from __future__ import annotations

from dataclasses import dataclass, field

from jinfer.cache.pages import NULL_PAGE
from jinfer.request import Request
from jinfer.schedule.shares import Share

Order = tuple[int, int]  # (class, arrival), see policy.py

NEVER = 2**62  # a token count that no sequence reaches


@dataclass(slots=True, eq=False)
class Held:
    """An entry's pages in one group, by position (page_size tokens each):

        pages[0, first)  the null page: no window reaches them any more, or the prefix cache told what is behind them
        pages[first, k)  full: never written again, and shared with others if the prefix cache knows them
        pages[k, len)    its own alone: its rows write them, they hold the tokens [k * page_size, num_computed)

    and `reserved` pages more that it has been promised for the rest of its prompt but has not taken. Decoding to its
    limit, it holds `most` at once.
    """

    pages: list[int] = field(default_factory=list)
    first: int = 0
    reserved: int = 0
    most: int = 0

    def __len__(self) -> int:
        """The pages held, the null page not counted."""
        return len(self.pages) - self.first

    def let_go(self, first: int) -> list[int]:
        """Takes the pages before `first` out, and returns them."""
        gone = self.pages[self.first : first]
        self.pages[self.first : first] = [NULL_PAGE] * len(gone)
        self.first = max(first, self.first)
        return gone


@dataclass(slots=True, eq=False)
class Entry:
    """The scheduler's record of one request, from `add` until it ends."""

    request: Request
    order: Order
    limit: int  # tokens it may have in all, prompt and output
    held: list[Held] = field(default_factory=list)  # per group while it runs, else empty
    page_end: int = 0  # its pages end here, in every group
    # From this many computed tokens on a decode row needs a new page, or may give back some.
    turn_at: int = 0
    num_found: int = 0  # pages found in every group at its admission
    num_full_found: int = 0  # the same, had no window been too short
    keys: list[bytes] = field(default_factory=list)  # of its first full pages, as far as they were needed
    num_prefilled: int = (
        0  # prompt tokens that have been counted as processed, each once whatever is computed anew
    )
    prefill_end: int = 0  # the tokens [num_computed, prefill_end) are known and not computed: prompt chunks
    to_sample: int = 0  # tokens that steps may still sample before `limit`; those in flight are taken off
    register_at: int = NEVER  # the next page becomes findable when this many tokens are computed and known
    is_queued: bool = False
    share: Share = field(init=False)  # its group's
    parked_behind: Entry | None = None  # the leader whose prompt this fork waits for
    forks: list[Entry] = field(default_factory=list)  # the entries parked behind this one
