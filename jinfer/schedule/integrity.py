"""Balances the scheduler's books. Slow and thorough: for tests, and for the engine when it is idle."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from jinfer.cache.groups import PageGroup
from jinfer.cache.pages import require
from jinfer.cache.prefix import page_key, root_key
from jinfer.request import RequestState
from jinfer.schedule.entry import Entry

if TYPE_CHECKING:
    from jinfer.schedule.scheduler import Scheduler


def check_scheduler(scheduler: Scheduler) -> None:
    """Raises IntegrityError naming the first thing that is wrong."""
    _check_whereabouts(scheduler)
    for place, group in enumerate(scheduler.groups):
        group.pool.check_integrity()
        group.cache.check_integrity()
        _check_pages(scheduler, place, group)
        for entry in scheduler.running.entries:
            _check_registered(entry, place, group)
        if not scheduler.running.entries:
            pool = group.pool
            require(pool.num_free + pool.num_cached == pool.num_total, "nothing runs, but pages are in use")
    size = scheduler.page_size
    slack = sum(e.page_end * size - e.request.num_computed for e in scheduler.running.entries)
    require(scheduler.running.slack == slack, "the unused token places are miscounted")


def _check_whereabouts(scheduler: Scheduler) -> None:
    """Every unfinished request is in one place, every slot has one owner or none."""
    running, queued, parked = scheduler.running.entries, scheduler.queue.entries(), scheduler.parked()
    held_back = scheduler.shares.held_back()
    everyone = running + queued + parked + held_back
    require(len(everyone) == len(set(map(id, everyone))), "a request is in two places")
    require({e.request for e in everyone} == set(scheduler.entries), "a request is lost")
    require(len(queued) == len(scheduler.queue), "the queue miscounts its entries")
    waiting = queued + parked + held_back
    require(len(waiting) == scheduler.num_waiting, "the parked forks are miscounted")
    _check_shares(scheduler, everyone, running + queued)
    orders = [e.order for e in running]
    require(orders == sorted(orders), "the running entries are out of order")
    for entry in running:
        require(
            entry.request.state is RequestState.RUNNING, f"{entry.request.request_id} runs in another state"
        )
    for entry in waiting:
        request = entry.request
        require(request.state is RequestState.WAITING, f"{request.request_id} waits in another state")
        require(not entry.held, f"{request.request_id} waits and holds pages")
        require(
            request.slot == -1 and request.num_computed == 0, f"{request.request_id} waits and holds a slot"
        )
    slots = sorted([e.request.slot for e in running] + scheduler.running.free_slots)
    require(slots == list(range(scheduler.max_num_seqs)), "a slot is lost or has two owners")


def _check_shares(scheduler: Scheduler, everyone: list[Entry], active: list[Entry]) -> None:
    """Every group counts its entries, and holds none back while it has less than its share."""
    entries, busy = Counter(id(e.share) for e in everyone), Counter(id(e.share) for e in active)
    for share in {id(e.share): e.share for e in everyone}.values():
        require(share.num_entries == entries[id(share)], "a group miscounts its entries")
        require(share.num_active == busy[id(share)], "a group miscounts what runs or is queued")
        is_full = share.num_active >= scheduler.shares.most
        require(is_full or not share.held_back, "a group has less than its share and holds an entry back")


def _check_pages(scheduler: Scheduler, place: int, group: PageGroup) -> None:
    """Refcounts equal owners; a page with several is a full one at the same place in each; the sums are
    right."""
    pool, size = group.pool, group.page_size
    owners: Counter[int] = Counter()
    index_of: dict[int, int] = {}
    total_held = total_reserved = 0
    for entry in scheduler.running.entries:
        held, computed = entry.held[place], entry.request.num_computed
        total_held += len(held)
        total_reserved += held.reserved
        require(len(held.pages) == entry.page_end, "an entry's tables do not end together")
        require(
            computed <= entry.page_end * size < computed + size, "an entry holds too few or too many pages"
        )
        known = entry.request.num_known_tokens
        require(entry.prefill_end <= known, "a prompt chunk would have unknown tokens")
        require(not any(held.pages[: held.first]), "a page that no window reaches is held")
        require(held.first <= group.first_page(computed), "a page that the window reaches was given back")
        if group.window is not None and computed > entry.prefill_end:
            require(len(held) <= group.decode_pages(computed), "an entry keeps more than its window needs")
        for index, page in enumerate(held.pages[held.first :], held.first):
            require(
                index_of.setdefault(page, index) == index,
                f"page {page} is in two places of its owners' tables",
            )
            owners[page] += 1
            require(
                pool.refcount(page) <= 1 or (index + 1) * size <= computed, f"shared page {page} is not full"
            )
    for page in range(pool.num_pages):
        require(
            pool.refcount(page) == owners[page], f"page {page} has {owners[page]} owners, refcount differs"
        )
    require(group.reserved == total_reserved, "the reserved pages are miscounted")
    require(group.held == total_held, "the pages held are miscounted")
    require(group.num_unclaimed >= 0, "more pages are promised than there are")


def _check_registered(entry: Entry, place: int, group: PageGroup) -> None:
    """A findable page of this entry has the key of the entry's tokens, hashed anew from the first one."""
    request, size = entry.request, group.page_size
    key = root_key(request.cache_salt)
    full = min(request.num_computed, request.num_known_tokens) // size
    held = entry.held[place]
    for index, page in enumerate(held.pages):
        found = group.cache.key_of(page) if index >= held.first else None
        if index < full:
            key = page_key(key, request.token_slice(index * size, (index + 1) * size))
            require(found in (None, key), f"page {page} is findable under another sequence's key")
        else:
            require(found is None, f"page {page} is findable but not full of known tokens")
