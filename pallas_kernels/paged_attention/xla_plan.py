"""What the XLA path derives from a batch once per step: where tokens go, which rows run together, which tiles exist."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.batch import RaggedBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """What every layer of a step needs and no layer changes.

    Attributes:
      pages, slots: int32[R]. Where each decode row's new token is kept.
      fresh, num_fresh: int32[R], int32[]. The decode rows that start a page, first in a list of all rows.
      write_pages, write_starts: int32[W]. A page that a prompt chunk writes to, and the flat token at its slot 0.
      write_low, write_high: int32[W]. The flat tokens of the row that the page takes are those in [low, high).
      num_writes: int32[]. Live entries of the four.
      rank: int32[R]. Each decode row's place among the rows sorted by context.
      order: int32[R]. The rows, longest context first, those that do not decode last.
      lasts, table: int32[R], int32[R, MP]. The sorted rows' last position (-1: not a decode row) and pages.
      tile_rows, tile_starts: int32[...]. The row and the first flat token of each tile of queries.
      num_tiles: int32[]. Live tiles.
      never: int32[], 0, which the compiler cannot know.
      tile: static. Query tokens per tile.
    """

    batch: RaggedBatch
    pages: jax.Array
    slots: jax.Array
    fresh: jax.Array
    num_fresh: jax.Array
    write_pages: jax.Array
    write_starts: jax.Array
    write_low: jax.Array
    write_high: jax.Array
    num_writes: jax.Array
    rank: jax.Array
    order: jax.Array
    lasts: jax.Array
    table: jax.Array
    tile_rows: jax.Array
    tile_starts: jax.Array
    num_tiles: jax.Array
    never: jax.Array
    tile: int = field(metadata={"static": True})


def make_plan(batch: RaggedBatch, num_tokens: int, page_size: int, tile: int) -> Plan:
    row = jnp.arange(batch.max_rows, dtype=jnp.int32)
    decodes = row < batch.num_decode_rows
    chunk_lens = jnp.where(decodes, 0, batch.query_starts[1:] - batch.query_starts[:-1])

    last = jnp.where(decodes, batch.context_lens - 1, -1)
    slot_page = jnp.take_along_axis(batch.page_table, jnp.maximum(last, 0)[:, None] // page_size, axis=1)

    slot = jnp.maximum(last, 0) % page_size
    starts_page = decodes & (slot == 0)

    order = jnp.argsort(-last).astype(jnp.int32)
    rank = jnp.argsort(order).astype(jnp.int32)

    if batch.decode_only:
        chunk = _no_chunks()
    else:
        chunk = _chunk_writes(batch, chunk_lens, num_tokens, page_size)
        chunk |= _chunk_tiles(batch, chunk_lens, num_tokens, tile)
    return Plan(
        batch=batch,
        pages=slot_page[:, 0],
        slots=slot,
        fresh=jnp.argsort(~starts_page).astype(jnp.int32),
        num_fresh=jnp.sum(starts_page, dtype=jnp.int32),
        rank=rank,
        order=order,
        lasts=last[order],
        table=batch.page_table[order],
        never=jnp.minimum(batch.num_rows, 0),
        tile=tile,
        **chunk,
    )


def _no_chunks() -> dict[str, jax.Array]:
    lists = ("write_pages", "write_starts", "write_low", "write_high", "tile_rows", "tile_starts")
    empty: dict[str, jax.Array] = {name: jnp.zeros((0,), jnp.int32) for name in lists}
    return empty | {name: jnp.zeros((), jnp.int32) for name in ("num_writes", "num_tiles")}


def _work_list(counts: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lays out counts[r] items of each row r one after the other: (row, index within the row, live items)."""
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    item = jnp.arange(size, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None] <= item[:, None], axis=1, dtype=jnp.int32), counts.shape[0] - 1)
    return row, item - (ends - counts)[row], ends[-1]


def _chunk_writes(
    batch: RaggedBatch, lens: jax.Array, num_tokens: int, page_size: int
) -> dict[str, jax.Array]:
    first_position = batch.context_lens - lens
    first_page = first_position // page_size
    counts = jnp.where(lens > 0, (batch.context_lens - 1) // page_size - first_page + 1, 0)
    # A chunk of n tokens touches at most n // page_size + 2 pages.
    row, index, total = _work_list(counts, num_tokens // page_size + 2 * batch.max_rows)
    page = first_page[row] + index
    return {
        "write_pages": batch.page_table[row, page],
        "write_starts": batch.query_starts[row] + page * page_size - first_position[row],
        "write_low": batch.query_starts[row],
        "write_high": batch.query_starts[row + 1],
        "num_writes": total,
    }


def _chunk_tiles(batch: RaggedBatch, lens: jax.Array, num_tokens: int, tile: int) -> dict[str, jax.Array]:
    row, index, total = _work_list(-(-lens // tile), num_tokens // tile + batch.max_rows)
    return {"tile_rows": row, "tile_starts": batch.query_starts[row] + index * tile, "num_tiles": total}
