"""In what order the TPU kernels go through the blocks of all rows: scalar arithmetic alone.

Both walks flatten rows (and tiles of them) into one sequence of blocks, so that copies can run ahead of the computation
across the end of a row. Row `num_rows` is the end of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class RowWalk:
    """The blocks of the rows before `num_rows`. contexts: int32[R] in SMEM. window: positions that a query sees, or None."""

    contexts: Any
    num_rows: Any
    block_tokens: int
    window: int | None

    def low(self, row: Any) -> Any:
        """The first position that the row's query sees."""
        return jnp.maximum(self.contexts[row] - self.window, 0) if self.window else jnp.int32(0)

    def first_block(self, row: Any) -> Any:
        return self.low(row) // self.block_tokens

    def following(self, row: Any, block: Any) -> tuple[Any, Any]:
        """The block after this one: of the same row, or the next row's first."""
        read = jnp.minimum(row, self.num_rows - 1)
        same = (block + 1) * self.block_tokens < self.contexts[read]
        next_row = jnp.where(same, row, jnp.minimum(row + 1, self.num_rows))
        first = self.first_block(jnp.minimum(next_row, self.num_rows - 1))
        return next_row, jnp.where(same, block + 1, first)


class Place(NamedTuple):
    """A block of a tile of a row, and how many tiles came before the tile."""

    row: Any
    offset: Any  # of the tile's first token among the row's
    block: Any
    count: Any


@dataclass(frozen=True)
class TileWalk:
    """The blocks of tiles of query tokens. starts: int32[R + 1], contexts: int32[R], both in SMEM."""

    starts: Any
    contexts: Any
    num_rows: Any
    tile: int
    small_tile: int
    block_tokens: int
    window: int | None

    def length(self, row: Any) -> Any:
        return self.starts[row + 1] - self.starts[row]

    def first_new(self, row: Any) -> Any:
        """The position of the row's first new token."""
        return self.contexts[row] - self.length(row)

    def span(self, row: Any, offset: Any) -> tuple[Any, Any, Any]:
        """The positions [low, end) that a tile's queries see, and the first query's own."""
        position = self.first_new(row) + offset
        low = jnp.maximum(position + 1 - self.window, 0) if self.window else jnp.int32(0)
        return low, self.first_new(row) + jnp.minimum(offset + self.tile, self.length(row)), position

    def first_block(self, row: Any, offset: Any) -> Any:
        return self.span(row, offset)[0] // self.block_tokens

    def token(self, at: Place) -> Any:
        """The flat token at which the tile begins."""
        return self.starts[at.row] + at.offset

    def is_small(self, at: Place) -> Any:
        return self.length(at.row) - at.offset <= self.small_tile

    def begins_tile(self, at: Place) -> Any:
        return at.block == self.first_block(at.row, at.offset)

    def from_row(self, row: Any, count: Any) -> Place:
        """The first place of the first row from this one on that has tokens."""

        def empty(row: Any) -> Any:
            return (row < self.num_rows) & (self.length(jnp.minimum(row, self.num_rows - 1)) == 0)

        row = lax.while_loop(empty, lambda row: row + 1, row)
        first = self.first_block(jnp.minimum(row, self.num_rows - 1), 0)
        return Place(row, jnp.int32(0), first, count)

    def following(self, at: Place) -> Place:
        read = jnp.minimum(at.row, self.num_rows - 1)
        same_tile = (at.block + 1) * self.block_tokens < self.span(read, at.offset)[1]
        same_row = same_tile | (at.offset + self.tile < self.length(read))
        offset = jnp.where(same_tile, at.offset, at.offset + self.tile)
        block = jnp.where(same_tile, at.block + 1, self.first_block(read, offset))
        count = jnp.where(same_tile, at.count, at.count + 1)
        return lax.cond(
            same_row,
            lambda: Place(at.row, offset, block, count),
            lambda: self.from_row(jnp.minimum(at.row + 1, self.num_rows), count),
        )
