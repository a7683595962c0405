"""What one step computes, in plain ints: the scheduler's answer and the runner's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jinfer.request import Request


@dataclass(slots=True, eq=False)
class BatchRow:
    """One sequence's part of a step: its tokens at positions [start, start + count)."""

    request: Request
    slot: int
    start: int  # tokens computed before this step
    count: int  # tokens of this step; 1 for a decode row
    from_slot: bool  # a decode row: its token is the slot's last, on device, maybe unknown to the host yet
    samples: bool  # the logits of its last token are sampled, which yields one token
    # Pages appended to the slot's tables in this step, per page group: new_pages[g][i] goes to place
    # new_page_start + i of group g's table, the null page where that group needs none. Empty if there are none.
    # A newly admitted row brings its whole tables, the pages found in the prefix cache among them, from the first
    # place on that any group needs: what a slot's last owner left before it lies outside every window.
    new_page_start: int
    new_pages: Sequence[Sequence[int]]


@dataclass(slots=True, eq=False)
class Batch:
    """One step. Steps run on the device in the order of their ids."""

    step_id: int
    rows: list[BatchRow]  # decode rows first
    num_decode_rows: int
    num_tokens: int
    admitted: list[Request] = field(default_factory=list)  # got their slot in this step

    def without(self, request: Request) -> Batch | None:
        """The step without one request's row; None if it had no other."""
        rows = [row for row in self.rows if row.request is not request]
        if not rows:
            return None
        num_decode_rows = sum(row.from_slot for row in rows)
        admitted = [other for other in self.admitted if other is not request]
        return Batch(self.step_id, rows, num_decode_rows, sum(row.count for row in rows), admitted)

    @property
    def decode_only(self) -> bool:
        return self.num_decode_rows == len(self.rows)
