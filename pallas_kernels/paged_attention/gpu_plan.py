"""What the GPU kernels derive from a batch once per step: pieces of decode rows, tiles of prompt chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu_tiles import Tile
from pallas_kernels.paged_attention.batch import RaggedBatch

ITEM_FIELDS = 5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pieces:
    """The contexts of decode rows, cut into pieces of whole KV blocks.

    Attributes:
      items: int32[N, 5]: row, first and last + 1 block, first and last + 1 key position that the row sees.
      num_items: int32[]. Live pieces.
      row_items: int32[R+1]. Row r has the pieces row_items[r]:row_items[r+1].
      table: int32[R, MP], the page table, padded to whole blocks.
    """

    items: jax.Array
    num_items: jax.Array
    row_items: jax.Array
    table: jax.Array


def cut_decodes(
    batch: RaggedBatch, page_size: int, kv_heads: int, kv_tokens: int, num_blocks: int, window: int | None
) -> Pieces:
    """Pieces of a length that keeps every streaming multiprocessor busy for about the same time.

    All pieces have the same number of blocks (a row's last one has the rest). Of a few lengths the one is taken that
    lets the busiest multiprocessor finish first, a piece costing one block more than it has.
    """
    rows = batch.max_rows
    table = whole_blocks(batch.page_table, page_size, kv_tokens)
    high = jnp.where(jnp.arange(rows) < batch.num_decode_rows, batch.context_lens, 0)
    low = jnp.zeros_like(high) if window is None else jnp.maximum(high - window, 0)
    first, last = low // kv_tokens, -(-high // kv_tokens)
    blocks = last - first

    most = table.shape[1] * page_size // kv_tokens
    limit = rows + -(-4 * num_blocks // kv_heads)
    lengths = jnp.asarray(_lengths(most), jnp.int32)
    counts = jnp.sum(-(-blocks[:, None] // lengths), axis=0, dtype=jnp.int32)
    time = -(-counts * kv_heads // num_blocks) * (lengths + 1)
    length = lengths[jnp.argmin(jnp.where(counts <= limit, time, jnp.iinfo(jnp.int32).max))]

    ends = jnp.cumsum(-(-blocks // length), dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    item = jnp.arange(limit, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None] <= item[:, None], axis=1, dtype=jnp.int32), rows - 1)
    begin = first[row] + (item - starts[row]) * length
    fields = [row, begin, jnp.minimum(begin + length, last[row]), low[row], high[row]]
    return Pieces(jnp.stack(fields, axis=1), ends[-1], starts, table)


def whole_blocks(table: jax.Array, page_size: int, kv_tokens: int) -> jax.Array:
    """The page table with the null page behind it, so that its last block of keys is whole."""
    pages = max(1, kv_tokens // page_size)
    return jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages)))


def copies_of(page_size: int, kv_tokens: int) -> tuple[int, int]:
    """How many copies fill a block of kv_tokens, and tokens of each: whole pages, or a part of one."""
    tokens = min(page_size, kv_tokens)
    return kv_tokens // tokens, tokens


def places_of(
    table_ref: Any, row: Any, block: Any, copies: range, page_size: int, kv_tokens: int
) -> list[Any]:
    """In a kernel: the page id and the slots of some copies of a block. All are read before any is used."""
    if page_size <= kv_tokens:
        first = block * (kv_tokens // page_size)
        return [(table_ref[row, first + i], slice(None)) for i in copies]
    parts = jnp.int32(page_size // kv_tokens)
    start = lax.rem(block, parts) * kv_tokens
    return [(table_ref[row, lax.div(block, parts)], pl.ds(start, kv_tokens)) for _ in copies]


def cut_prompts(
    batch: RaggedBatch, num_tokens: int, tile_tokens: int, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Tiles of the rows that do not decode, and how many there are: what `run_tiles` takes."""
    rows = batch.max_rows
    decodes = jnp.arange(rows) < batch.num_decode_rows
    lengths = jnp.where(decodes, 0, batch.query_starts[1:] - batch.query_starts[:-1])
    counts = -(-lengths // tile_tokens)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    item = jnp.arange(num_tokens // tile_tokens + rows, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None] <= item[:, None], axis=1, dtype=jnp.int32), rows - 1)
    before = (item - (ends - counts)[row]) * tile_tokens
    new = batch.context_lens[row] - lengths[row]
    position = new + before
    high = position + jnp.minimum(tile_tokens, lengths[row] - before)
    low = jnp.zeros_like(high) if window is None else jnp.maximum(position - window + 1, 0)
    live = item < ends[-1]  # the others sort to the end
    low, high = jnp.where(live, low, 0), jnp.where(live, high, -1)
    token = batch.query_starts[row] + before
    return Tile(row, token, high - position, position, low, high, new).pack(), ends[-1]


def _lengths(most: int) -> list[int]:
    """Piece lengths to choose from, in blocks: steps of about an eighth, up to a row's whole context."""
    lengths = [1]
    while lengths[-1] < most:
        lengths.append(min(most, max(lengths[-1] + 1, lengths[-1] * 9 // 8)))
    return lengths
