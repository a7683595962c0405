"""Writing new keys and values into pages on a TPU, in place.

A slab's rows lie in tiles of 8 to 32 rows, and rows narrower than 32 bits share words, so one token cannot be stored
alone: what is written is a tile of rows. A tile whose earlier rows hold older tokens is fetched, merged and stored back;
rows behind a row's last new token become zeros. The tiles of a step are independent, so many are in flight at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.batch import RaggedBatch

# A copy takes microseconds whatever its size, so as many tiles are in flight as fit in this, up to MOST_IN_FLIGHT.
RING_BYTES = 8 * 1024 * 1024
MOST_IN_FLIGHT = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Writes:
    """The tiles that a step writes to: W lists places, of which `count` are live.

    Attributes:
      pages, tiles: int32[W]. A page, before the layer's offset, and a tile of rows within it.
      first: int32[W]. The flat token at the tile's first row; below `low` where older tokens come first.
      low, high: int32[W]. The row's flat tokens are those in [low, high).
      count: int32[1].
      tokens: static. New tokens fetched per tile: 1 where no row has more.
    """

    pages: jax.Array
    tiles: jax.Array
    first: jax.Array
    low: jax.Array
    high: jax.Array
    count: jax.Array
    tokens: int = field(metadata={"static": True})


def plan_writes(batch: RaggedBatch, num_tokens: int, page_size: int, tile: int) -> Writes:
    """tile: rows of one tile, a divisor of page_size."""
    lengths = batch.query_starts[1:] - batch.query_starts[:-1]
    first_position = batch.context_lens - lengths
    first_tile = first_position // tile
    counts = jnp.where(lengths > 0, (batch.context_lens - 1) // tile - first_tile + 1, 0)
    # n tokens touch at most n // tile + 2 tiles, and one token one.
    size = batch.max_rows if batch.decode_only else num_tokens // tile + 2 * batch.max_rows
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    item = jnp.arange(size, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None] <= item[:, None], axis=1, dtype=jnp.int32), batch.max_rows - 1)
    tile_index = first_tile[row] + item - (ends - counts)[row]
    per_page = page_size // tile
    column = jnp.clip(tile_index // per_page, 0, batch.page_table.shape[1] - 1)
    return Writes(
        pages=batch.page_table[row, column],
        tiles=tile_index % per_page,
        first=batch.query_starts[row] + tile_index * tile - first_position[row],
        low=batch.query_starts[row],
        high=batch.query_starts[row + 1],
        count=ends[-1:],
        tokens=1 if batch.decode_only else tile,
    )


def write(pages: jax.Array, new: jax.Array, writes: Writes, offset: jax.Array, tile: int) -> jax.Array:
    """Returns the pages with the new rows in their places.

    Args:
      pages: [P, C, K, S, L]; updated in place where the caller donates it.
      new: [T, C * K, L], of the pages' dtype.
      offset: int32[1], added to every page id.
    """
    _, num_slabs, num_kv_heads, _, lanes = pages.shape
    # As 32-bit numbers, whose rows can be picked one by one; with room for a tile that starts before or ends behind.
    pad = 0 if writes.tokens == 1 else tile
    new = jnp.pad(new.astype(jnp.float32), ((pad, pad), (0, 0), (0, 0)))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    scalars = (writes.count, offset, writes.pages, writes.tiles, writes.first, writes.low, writes.high)
    slabs = num_slabs * num_kv_heads
    item_bytes = slabs * lanes * (4 * writes.tokens + 2 * tile * pages.dtype.itemsize)
    ring = min(max(2, RING_BYTES // item_bytes), MOST_IN_FLIGHT, writes.pages.shape[0])
    slab_tile = pltpu.VMEM((ring, num_slabs, num_kv_heads, tile, lanes), pages.dtype)
    return pl.pallas_call(
        partial(_kernel, pad=pad, tokens=writes.tokens),
        name="paged_attention_write",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM((ring, writes.tokens, slabs, lanes), jnp.float32),
                slab_tile,
                slab_tile,
                pltpu.SemaphoreType.DMA((3, ring)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        input_output_aliases={len(scalars) + 1: 0},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=4 * RING_BYTES, disable_bounds_checks=True),
    )(*scalars, new, pages)


def _kernel(
    count,
    offset,
    page_ids,
    tiles,
    firsts,
    lows,
    highs,
    new_hbm,
    _,
    pool,
    new,
    old,
    merged,
    semaphores,
    *,
    pad: int,
    tokens: int,
):
    ring, num_slabs, num_kv_heads, tile = old.shape[:4]
    num_items = count[0]

    def place(item):
        rows = pl.ds(pl.multiple_of(tiles[item] * tile, tile), tile)
        return pool.at[page_ids[item] + offset[0], :, :, rows]

    def new_copy(item, slot):
        # A tile's only new token, or the tokens of all its rows.
        token = lows[item] if tokens == 1 else firsts[item] + pad
        return pltpu.make_async_copy(new_hbm.at[pl.ds(token, tokens)], new.at[slot], semaphores.at[0, slot])

    def old_copy(item, slot):
        return pltpu.make_async_copy(place(item), old.at[slot], semaphores.at[1, slot])

    def merged_copy(item, slot):
        return pltpu.make_async_copy(merged.at[slot], place(item), semaphores.at[2, slot])

    def start(item):
        slot = lax.rem(item, ring)
        new_copy(item, slot).start()
        pl.when(firsts[item] < lows[item])(lambda: old_copy(item, slot).start())

    @pl.loop(0, jnp.minimum(ring - 1, num_items))
    def _(item):
        start(item)

    @pl.loop(0, num_items)
    def _(item):
        slot = lax.rem(item, ring)
        pl.when(item + ring - 1 < num_items)(lambda: start(item + ring - 1))
        pl.when(item >= ring)(lambda: merged_copy(item - ring, slot).wait())
        new_copy(item, slot).wait()
        pl.when(firsts[item] < lows[item])(lambda: old_copy(item, slot).wait())
        token = firsts[item] + lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
        is_old, is_new = token < lows[item], (token >= lows[item]) & (token < highs[item])
        for slab in range(num_slabs * num_kv_heads):
            at = (slot, *divmod(slab, num_kv_heads))
            rows = jnp.where(is_new, new[slot, :, slab, :], 0.0)
            rows = jnp.where(is_old, old[at].astype(jnp.float32), rows)
            merged[at] = rows.astype(merged.dtype)
        merged_copy(item, slot).start()

    @pl.loop(jnp.maximum(num_items - ring, 0), num_items)
    def _(item):
        merged_copy(item, lax.rem(item, ring)).wait()
