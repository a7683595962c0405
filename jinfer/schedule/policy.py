"""Who goes first: the order of requests, and the queue that keeps it.

An order is a pair (class, arrival): lower goes first. Under `fcfs` there is one class; under `priority` the
class is the request's priority. The arrival number is given once, when the request is added, and survives
preemption: a preempted request returns to the head of its class, before everything that came later.
"""

from __future__ import annotations

import heapq

from jinfer.errors import ConfigError
from jinfer.request import Request
from jinfer.schedule.entry import Entry, Order

POLICIES = ("fcfs", "priority")


def check_policy(policy: str) -> str:
    if policy not in POLICIES:
        raise ConfigError(f"scheduling policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    return policy


def order_of(request: Request, arrival: int, policy: str) -> Order:
    """The place of a request; `arrival` numbers the calls of `Scheduler.add`."""
    return (request.priority if policy == "priority" else 0, arrival)


class WaitingQueue:
    """Waiting entries by order. A removed one leaves its tuple in the heap until that surfaces."""

    def __init__(self) -> None:
        self._heap: list[tuple[Order, Entry]] = []  # orders are unique, so entries are never compared
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, entry: Entry) -> None:
        entry.is_queued = True
        self._size += 1
        heapq.heappush(self._heap, (entry.order, entry))

    def head(self) -> Entry | None:
        """The first entry, which stays in the queue."""
        while self._heap:
            entry = self._heap[0][1]
            if entry.is_queued:
                return entry
            heapq.heappop(self._heap)
        return None

    def remove(self, entry: Entry) -> None:
        entry.is_queued = False
        self._size -= 1
        if self._heap[0][1] is entry:
            heapq.heappop(self._heap)
        elif len(self._heap) > 2 * self._size + 64:  # else aborted low-priority entries could pile up unseen
            self._heap = [item for item in self._heap if item[1].is_queued]
            heapq.heapify(self._heap)

    def entries(self) -> list[Entry]:
        """Every waiting entry, first to go first."""
        return [entry for _, entry in sorted(item for item in self._heap if item[1].is_queued)]
