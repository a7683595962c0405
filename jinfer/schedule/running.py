"""What the running requests hold together: slots, pages, and pages promised."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence

from jinfer.cache.groups import GroupSize, PageGroup
from jinfer.cache.pages import NULL_PAGE
from jinfer.request import RequestState
from jinfer.schedule.entry import NEVER, Entry, Held, Order
from jinfer.schedule.sharing import PageSharing


def _order(entry: Entry) -> Order:
    return entry.order


class RunningSet:
    """Owns the slots [0, num_slots) and every group's pages [1, num_pages), and lends them to the entries that run.

    A request in RUNNING has one slot and an `entries` place; only `admit` and `leave` change that. Pages that are
    promised to an entry for the rest of its prompt are nobody's yet, and nobody else may take them (see `PageGroup`).
    """

    def __init__(
        self,
        sizes: Sequence[GroupSize],
        page_size: int,
        num_slots: int,
        chunk: int,
        only_forks_share: bool,
    ) -> None:
        self.page_size = page_size
        self.groups = [PageGroup(size, page_size, chunk) for size in sizes]
        self.has_windows = any(group.window is not None for group in self.groups)
        self.sharing = PageSharing(self.groups, page_size, only_forks_share)
        self.entries: list[Entry] = []  # by order: the last one is preempted first
        self.num_slots = num_slots
        self.free_slots = list(range(num_slots))  # a heap: low slots first keep the runner's arrays dense
        # Token places in the entries' pages that hold no KV yet: the same in every group, whose pages end together.
        self.slack = 0

    @property
    def has_room(self) -> bool:
        """Whether anyone may take a page in every group."""
        return all(group.num_unclaimed > 0 for group in self.groups)

    def admit(self, entry: Entry) -> bool:
        """Gives a waiting entry a slot, its cached pages, and a promise of pages for its other known tokens.

        There must be a free slot. False, with nothing changed: the pages do not suffice.
        """
        request = entry.request
        prefill_end = request.num_known_tokens
        self.sharing.find(entry, prefill_end)
        num_found = entry.num_found
        start = num_found * self.page_size
        held: list[Held] = []
        for place, group in enumerate(self.groups):
            first = group.first_page(start)
            hits = self.sharing.pages(entry, group, first, num_found)
            most = group.prefill_pages(start, prefill_end)
            promised = most - len(hits)
            cost = most
            if group.window is None:
                # Cached pages that nobody uses are available now, and no longer once this entry has them.
                cost = promised + sum(1 for page in hits if group.pool.refcount(page) == 0)
            if cost + self._growing(place) > group.num_unclaimed:
                return False
            held.append(
                Held([NULL_PAGE] * first + hits, first, promised, group.decode_pages(entry.limit - 1))
            )
        for group, one in zip(self.groups, held):
            group.pool.retain(one.pages[one.first :])
            group.held += len(one)
            group.reserved += one.reserved
        entry.held = held
        entry.page_end = num_found
        entry.prefill_end = prefill_end
        entry.to_sample = entry.limit - prefill_end
        self.sharing.start_registering(entry, num_found)
        insort(self.entries, entry, key=_order)
        request.state = RequestState.RUNNING
        request.slot = heapq.heappop(self.free_slots)
        request.num_computed = start
        return True

    def _growing(self, place: int) -> int:
        """Entries that will need more pages of a group than they have. If these can push a newcomer out within their
        next page, admitting it is work thrown away."""
        count = 0
        for entry in self.entries:
            held = entry.held[place]
            count += held.most > len(held.pages) - held.first + held.reserved
        return count

    def slide(self, entry: Entry, start: int) -> None:
        """Gives back the pages that no token from `start` on can see: the entry's next rows begin there."""
        entry.turn_at = entry.page_end * self.page_size
        if not self.has_windows:
            return
        for group, held in zip(self.groups, entry.held):
            if group.window is None:
                continue
            first = held.first
            gone = held.let_go(group.first_page(start))
            self.sharing.release_behind(entry, group, first, gone)
            group.held -= len(gone)
            # What it gives back it may need again for the rest of its prompt, but never more than it had.
            if start < entry.prefill_end:
                promised = group.prefill_pages(start, entry.prefill_end) - len(held)
                group.reserved += promised - held.reserved
                held.reserved = promised

    def grow(self, entry: Entry) -> list[list[int]]:
        """One page more in every group for a decoding entry; the caller has seen to it that they are unclaimed."""
        new = []
        for group, held in zip(self.groups, entry.held):
            pages = group.pool.allocate(1)
            held.pages += pages
            group.held += 1
            new.append(pages)
        self._extend(entry, entry.page_end + 1)
        return new

    def take_promised(self, entry: Entry, start: int, end: int) -> None:
        """Turns promised pages into the entry's own, until they hold its tokens [start, end) and what these see."""
        self.slide(entry, start)
        page_end = -(-end // self.page_size)
        count = page_end - entry.page_end
        if count > 0:
            for group, held in zip(self.groups, entry.held):
                held.pages += group.pool.allocate(count)
                held.reserved -= count
                group.held += count
                group.reserved -= count
            self._extend(entry, page_end)
        if self.has_windows and end >= entry.prefill_end:
            entry.turn_at = end  # the first token decoded needs little of what the chunk needed

    def _extend(self, entry: Entry, page_end: int) -> None:
        self.slack += (page_end - entry.page_end) * self.page_size
        entry.page_end = page_end
        entry.turn_at = page_end * self.page_size

    def leave(self, entry: Entry) -> None:
        """Takes everything back from a running entry; its request's state is the caller's to set."""
        request = entry.request
        self.entries.remove(entry)
        self.slack -= entry.page_end * self.page_size - request.num_computed
        for group, held in zip(self.groups, entry.held):
            # Last first: a chain's leaves are evicted before its root.
            group.pool.release(reversed(held.pages[held.first :]))
            group.held -= len(held)
            group.reserved -= held.reserved
        heapq.heappush(self.free_slots, request.slot)
        entry.held = []
        entry.page_end = entry.turn_at = entry.prefill_end = entry.to_sample = 0
        entry.register_at = NEVER
        request.slot = -1
        request.num_computed = 0

    def reset_prefix_cache(self) -> None:
        """See `Scheduler.reset_prefix_cache`."""
        for group in self.groups:
            group.cache.reset()
        for entry in self.entries:
            entry.register_at = NEVER
