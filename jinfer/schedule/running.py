"""What the running requests hold together: slots, pages, and pages promised."""

from __future__ import annotations

import heapq
from bisect import insort

from jinfer.cache.pages import PagePool
from jinfer.request import RequestState
from jinfer.schedule.entry import NEVER, Entry, Order
from jinfer.schedule.sharing import PageSharing


def _order(entry: Entry) -> Order:
    return entry.order


class RunningSet:
    """Owns the slots [0, num_slots) and the pages [1, num_pages), and lends them to the entries that run.

    A request in RUNNING has one slot and an `entries` place; only `admit` and `leave` change that. Pages that
    are available but promised to an entry for the rest of its prompt are nobody's yet, and nobody else may
    take them:

        num_available = reserved (promised) + num_unclaimed
    """

    def __init__(self, num_pages: int, page_size: int, num_slots: int, only_forks_share: bool) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.sharing = PageSharing(self.pool, page_size, only_forks_share)
        self.entries: list[Entry] = []  # by order: the last one is preempted first
        self.num_slots = num_slots
        self.free_slots = list(range(num_slots))  # a heap: low slots first keep the runner's arrays dense
        self.reserved = 0  # the sum of the entries' `reserved`
        self.slack = 0  # token places in the entries' pages that hold no KV yet

    @property
    def num_unclaimed(self) -> int:
        """Pages that anyone may take now."""
        return self.pool.num_available - self.reserved

    def admit(self, entry: Entry) -> bool:
        """Gives a waiting entry a slot, its cached pages, and a promise of pages for its other known tokens.

        There must be a free slot. False, with nothing changed: the pages do not suffice.
        """
        request, size = entry.request, self.page_size
        prefill_end = request.num_known_tokens
        hits = self.sharing.find(entry, prefill_end)
        fresh = -(-prefill_end // size) - len(hits)
        # Cached pages that nobody uses are available now, and no longer once this entry has them.
        unused = sum(1 for page in hits if self.pool.refcount(page) == 0)
        # If the others can push a newcomer out within their next page, admitting it is work thrown away.
        growing = sum(1 for e in self.entries if -(-(e.limit - 1) // size) > len(e.pages) + e.reserved)
        if fresh + unused + growing > self.num_unclaimed:
            return False
        self.pool.retain(hits)
        entry.pages = hits
        entry.reserved = fresh
        self.reserved += fresh
        entry.prefill_end = prefill_end
        entry.to_sample = entry.limit - prefill_end
        self.sharing.start_registering(entry, len(hits))
        insort(self.entries, entry, key=_order)
        request.state = RequestState.RUNNING
        request.slot = heapq.heappop(self.free_slots)
        request.num_computed = len(hits) * size
        return True

    def grow(self, entry: Entry) -> list[int]:
        """One page more for a decoding entry; the caller has seen to it that one is unclaimed."""
        pages = self.pool.allocate(1)
        entry.pages += pages
        self.slack += self.page_size
        return pages

    def take_promised(self, entry: Entry, end: int) -> None:
        """Turns promised pages into the entry's own, until they hold its tokens [0, end)."""
        needed = -(-end // self.page_size) - len(entry.pages)
        if needed > 0:
            entry.pages += self.pool.allocate(needed)
            entry.reserved -= needed
            self.reserved -= needed
            self.slack += needed * self.page_size

    def leave(self, entry: Entry) -> None:
        """Takes everything back from a running entry; its request's state is the caller's to set."""
        request = entry.request
        self.entries.remove(entry)
        self.slack -= len(entry.pages) * self.page_size - request.num_computed
        self.pool.release(reversed(entry.pages))  # a chain's leaves are evicted before its root
        self.reserved -= entry.reserved
        heapq.heappush(self.free_slots, request.slot)
        entry.pages = []
        entry.reserved = entry.prefill_end = entry.to_sample = 0
        entry.register_at = NEVER
        request.slot = -1
        request.num_computed = 0

    def reset_prefix_cache(self) -> None:
        """See `Scheduler.reset_prefix_cache`."""
        self.sharing.cache.reset()
        for entry in self.entries:
            entry.register_at = NEVER
