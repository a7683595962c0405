"""How XLA lays arrays out in a TPU's memory, where code has to go along with it."""

from __future__ import annotations

LANES = 128


def last_in_lanes(rows: int, columns: int, itemsize: int) -> bool:
    """Whether XLA keeps arrays [.., rows, columns] with the columns in the lanes, the order they are written in.

    Where the other order has less padding it takes that one. Code that wants the first all the same, a kernel's
    operand or a gather of rows, then makes it copy the whole array, in every step.

    itemsize: bytes of a number.
    """
    sublanes = 32 // itemsize

    def padded(rows: int, columns: int) -> int:
        return -(-rows // sublanes) * sublanes * -(-columns // LANES) * LANES

    return padded(rows, columns) <= padded(columns, rows)
