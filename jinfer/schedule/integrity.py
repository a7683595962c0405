"""Balances the scheduler's books. Slow and thorough: for tests, and for the engine when it is idle."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from jinfer.cache.pages import require
from jinfer.cache.prefix import page_key, root_key
from jinfer.request import RequestState
from jinfer.schedule.entry import Entry

if TYPE_CHECKING:
    from jinfer.schedule.scheduler import Scheduler


def check_scheduler(scheduler: Scheduler) -> None:
    """Raises IntegrityError naming the first thing that is wrong."""
    scheduler.pool.check_integrity()
    scheduler.running.sharing.cache.check_integrity()
    _check_whereabouts(scheduler)
    _check_pages(scheduler)
    for entry in scheduler.running.entries:
        _check_registered(scheduler, entry)
    if not scheduler.running.entries:
        pool = scheduler.pool
        require(pool.num_free + pool.num_cached == pool.num_total, "nothing runs, but pages are in use")


def _check_whereabouts(scheduler: Scheduler) -> None:
    """Every unfinished request is in one place, every slot has one owner or none."""
    running, queued, parked = scheduler.running.entries, scheduler.queue.entries(), scheduler.parked()
    everyone = running + queued + parked
    require(len(everyone) == len(set(map(id, everyone))), "a request is in two places")
    require({e.request for e in everyone} == set(scheduler.entries), "a request is lost")
    require(len(queued) == len(scheduler.queue), "the queue miscounts its entries")
    require(len(parked) == scheduler.num_waiting - len(queued), "the parked forks are miscounted")
    orders = [e.order for e in running]
    require(orders == sorted(orders), "the running entries are out of order")
    for entry in running:
        require(
            entry.request.state is RequestState.RUNNING, f"{entry.request.request_id} runs in another state"
        )
    for entry in queued + parked:
        request = entry.request
        require(request.state is RequestState.WAITING, f"{request.request_id} waits in another state")
        require(not entry.pages and not entry.reserved, f"{request.request_id} waits and holds pages")
        require(
            request.slot == -1 and request.num_computed == 0, f"{request.request_id} waits and holds a slot"
        )
    slots = sorted([e.request.slot for e in running] + scheduler.running.free_slots)
    require(slots == list(range(scheduler.max_num_seqs)), "a slot is lost or has two owners")


def _check_pages(scheduler: Scheduler) -> None:
    """Refcounts equal owners; a page with several is a full one at the same place in each; the sums are
    right."""
    pool, size = scheduler.pool, scheduler.page_size
    owners: Counter[int] = Counter()
    index_of: dict[int, int] = {}
    for entry in scheduler.running.entries:
        owners.update(entry.pages)
        computed = entry.request.num_computed
        require(
            computed <= len(entry.pages) * size < computed + size, "an entry holds too few or too many pages"
        )
        known = entry.request.num_known_tokens
        require(entry.prefill_end <= known, "a prompt chunk would have unknown tokens")
        for index, page in enumerate(entry.pages):
            require(
                index_of.setdefault(page, index) == index,
                f"page {page} is in two places of its owners' tables",
            )
            require(
                pool.refcount(page) <= 1 or (index + 1) * size <= computed, f"shared page {page} is not full"
            )
    for page in range(pool.num_pages):
        require(
            pool.refcount(page) == owners[page], f"page {page} has {owners[page]} owners, refcount differs"
        )
    reserved = sum(e.reserved for e in scheduler.running.entries)
    require(scheduler.running.reserved == reserved, "the reserved pages are miscounted")
    require(reserved <= pool.num_available, "more pages are promised than there are")
    slack = sum(len(e.pages) * size - e.request.num_computed for e in scheduler.running.entries)
    require(scheduler.running.slack == slack, "the unused token places are miscounted")


def _check_registered(scheduler: Scheduler, entry: Entry) -> None:
    """A findable page of this entry has the key of the entry's tokens, hashed anew from the first one."""
    request, size = entry.request, scheduler.page_size
    key = root_key(request.cache_salt)
    full = min(request.num_computed, request.num_known_tokens) // size
    for index, page in enumerate(entry.pages):
        found = scheduler.running.sharing.cache.key_of(page)
        if index < full:
            key = page_key(key, request.token_slice(index * size, (index + 1) * size))
            require(found in (None, key), f"page {page} is findable under another sequence's key")
        else:
            require(found is None, f"page {page} is findable but not full of known tokens")
