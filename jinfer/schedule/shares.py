"""How many sequences of one group may run while others have requests too.

A group is all choices of one request, or all requests that say so: the prompts of one HTTP request. Each sequence that
runs makes every step longer, so without a bound one request with 64 choices would slow down the streams of all others,
and take every slot from those who come next.

What a group has beyond its share is held back. A held-back entry comes into the queue when one of its group ends, or
into a place that is free while no group has less than its share: one group alone, or several that all want more. Its
group's others run meanwhile, so it waits for nobody but them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinfer.schedule.entry import Entry


@dataclass(slots=True, eq=False)
class Share:
    """One group's."""

    key: tuple[str, str]
    num_entries: int = 0  # unfinished ones, wherever they are
    num_active: int = 0  # those of them that run or are in the queue
    held_back: dict[Entry, None] = field(default_factory=dict)  # by order


class Shares:
    """most: sequences that one group may have active while another has no more than that."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_held_back = 0
        self._of: dict[tuple[str, str], Share] = {}

    def held_back(self) -> list[Entry]:
        return [entry for share in self._of.values() for entry in share.held_back]

    def add(self, entry: Entry) -> Share:
        """Counts a new entry; returns the share of its group."""
        request = entry.request
        key = (request.group, "") if request.group else ("", request.request_id)
        share = self._of.get(key)
        if share is None:
            share = self._of[key] = Share(key)
        share.num_entries += 1
        return share

    def claim(self, entry: Entry) -> bool:
        """Whether an entry may enter the queue. If not, it is held back."""
        share = entry.share
        if share.num_active < self.most:
            share.num_active += 1
            return True
        share.held_back[entry] = None
        self.num_held_back += 1
        return False

    def remove(self, entry: Entry, was_active: bool) -> Entry | None:
        """Takes out an entry that has ended. Returns the one of its group that may enter the queue instead."""
        share = entry.share
        share.num_entries -= 1
        if not share.num_entries:
            del self._of[share.key]
        if entry in share.held_back:
            del share.held_back[entry]
            self.num_held_back -= 1
        if not was_active:
            return None
        share.num_active -= 1
        return self._release(share) if share.num_active < self.most else None

    def next_beyond(self) -> Entry | None:
        """One that may enter the queue beyond its group's share: every group wants more than that, so no stream of
        another kind is slowed down. It is of the group that has the fewest active."""
        if not all(share.held_back for share in self._of.values()):
            return None
        share = min(self._of.values(), key=lambda share: share.num_active, default=None)
        return None if share is None else self._release(share)

    def _release(self, share: Share) -> Entry | None:
        entry = next(iter(share.held_back), None)
        if entry is not None:
            del share.held_back[entry]
            self.num_held_back -= 1
            share.num_active += 1
        return entry
