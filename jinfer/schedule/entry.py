"""The scheduler's own record of a request: what it holds and what it may still do."""

from __future__ import annotations

from dataclasses import dataclass, field

from jinfer.request import Request

Order = tuple[int, int]  # (class, arrival), see policy.py

NEVER = 2**62  # a token count that no sequence reaches


@dataclass(slots=True, eq=False)
class Entry:
    """The scheduler's record of one request, from `add` until it ends.

    Pages of a running entry, by position (page_size tokens each):

        pages[0, k)     full: never written again, and shared with others if the prefix cache knows them
        pages[k, len)   its own alone: its rows write them, they hold the tokens [k * page_size, num_computed)

    and `reserved` pages more that it has been promised for the rest of its prompt but has not taken.
    """

    request: Request
    order: Order
    limit: int  # tokens it may have in all, prompt and output
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its first full pages, as far as they were needed
    reserved: int = 0
    prefill_end: int = 0  # the tokens [num_computed, prefill_end) are known and not computed: prompt chunks
    to_sample: int = 0  # tokens that steps may still sample before `limit`; those in flight are taken off
    register_at: int = NEVER  # the next page becomes findable when this many tokens are computed and known
    is_queued: bool = False
    parked_behind: Entry | None = None  # the leader whose prompt this fork waits for
    forks: list[Entry] = field(default_factory=list)  # the entries parked behind this one
