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
    # Pages appended to the slot's table in this step: table[new_page_start, new_page_start + len(new_pages)).
    # For a newly admitted row new_page_start is 0 and the pages found in the prefix cache are among them.
    new_page_start: int
    new_pages: Sequence[int]


@dataclass(slots=True, eq=False)
class Batch:
    """One step. Steps run on the device in the order of their ids."""

    step_id: int
    rows: list[BatchRow]  # decode rows first
    num_decode_rows: int
    num_tokens: int
    admitted: list[Request] = field(default_factory=list)  # got their slot in this step

    @property
    def decode_only(self) -> bool:
        return self.num_decode_rows == len(self.rows)
