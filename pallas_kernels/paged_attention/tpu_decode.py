"""Decode rows on a TPU: one query token per row, pages streamed through a ring of buffers.

The blocks of all rows form one sequence. The copies of a block start `buffers - 1` blocks ahead, across the end of a row
too, so the memory stays busy while the core computes. A block that is seen whole takes one unrolled pass over its heads;
the others (a row's last, and the first behind a sliding window) go in smaller parts with a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.tpu_pages import LANES, MASKED, BlockCopies, product, spread, work_dtype
from pallas_kernels.paged_attention.tpu_walk import RowWalk

ROWS, OFFSET = 0, 1  # places in `meta`


@dataclass(frozen=True)
class DecodeConfig:
    """What is static in the kernel.

    Attributes:
      block_pages, buffers: pages per block, and how many blocks are in VMEM at once.
      part_pages: pages per part of a block that is not seen whole.
      window: positions that a query sees, or None.
      cap: soft cap in units of the base-2 logits, or None: queries are divided by it.
      row_pages: MP.
      cores: 2 where a device is two cores: they share the KV heads, or the rows where the heads do not divide.
      value_lanes: L', of a slab from its first lane on, that are multiplied as values; L where it is not shared.
    """

    block_pages: int
    buffers: int
    part_pages: int
    window: int | None
    cap: float | None
    row_pages: int
    cores: int
    vmem_bytes: int
    value_lanes: int


def decode(
    q: jax.Array,
    pages: jax.Array,
    context_lens: jax.Array,
    table: jax.Array,
    meta: jax.Array,
    sinks: jax.Array,
    config: DecodeConfig,
) -> jax.Array:
    """Softmax attention of one query token per row.

    Args:
      q: float32[R, K, G, L], scaled (by log2 e too), G a multiple of 8.
      pages: [P, C, K, S, L].
      context_lens: int32[R]. table: int32[R * MP]. meta: int32[2], see ROWS and OFFSET.
      sinks: float32[K, G, 128], base-2 logits, equal lanes; MASKED where there is none.

    Returns:
      float32[R, K, G, L']; rows from meta[ROWS] on are not written.
    """
    _, num_slabs, num_kv_heads, page_size, lanes = pages.shape
    group = q.shape[2]
    split_heads = num_kv_heads % config.cores == 0
    num_kv_heads = num_kv_heads // config.cores if split_heads else num_kv_heads
    buffer = (config.buffers, config.block_pages, num_slabs, num_kv_heads, page_size, lanes)
    per_row = (config.buffers, num_kv_heads, group)
    state = pltpu.VMEM((num_kv_heads, group, LANES), jnp.float32)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        partial(_kernel, config=config),
        name="paged_attention_decode",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(config.cores,),
            in_specs=[
                pl.BlockSpec(
                    (num_kv_heads, group, LANES), lambda core, *_: (core if split_heads else 0, 0, 0)
                ),
                hbm,
                hbm,
            ],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM(buffer, pages.dtype),
                pltpu.VMEM((*per_row, lanes), jnp.float32),
                pltpu.VMEM((*per_row, config.value_lanes), jnp.float32),
                state,
                state,
                pltpu.VMEM((num_kv_heads, group, config.value_lanes), jnp.float32),
                pltpu.SemaphoreType.DMA((3, config.buffers)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((*q.shape[:3], config.value_lanes), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=config.vmem_bytes,
            disable_bounds_checks=True,
        ),
    )(meta, context_lens, table, sinks, q, pages)


def _kernel(
    meta,
    contexts,
    table,
    sinks,
    q_hbm,
    pool,
    out_hbm,
    pages,
    queries,
    outputs,
    top,
    total,
    acc,
    semaphores,
    *,
    config: DecodeConfig,
):
    core, first_row, num_rows, first_head = pl.program_id(0), jnp.int32(0), meta[ROWS], jnp.int32(0)
    if pool.shape[2] % config.cores == 0:
        first_head = core * acc.shape[0]
    else:
        share = (meta[ROWS] + config.cores - 1) // config.cores
        first_row, num_rows = core * share, jnp.minimum((core + 1) * share, meta[ROWS])
    heads = pl.ds(first_head, acc.shape[0])
    copies = BlockCopies(table, config.row_pages, meta[OFFSET], pool, pages, semaphores.at[0], first_head)
    block_tokens = config.block_pages * pool.shape[3]
    walk = RowWalk(contexts, num_rows, block_tokens, config.window)

    def query_copy(row):
        slot = lax.rem(row, config.buffers)
        return pltpu.make_async_copy(q_hbm.at[row, heads], queries.at[slot], semaphores.at[1, slot])

    def output_copy(row):
        slot = lax.rem(row, config.buffers)
        return pltpu.make_async_copy(outputs.at[slot], out_hbm.at[row, heads], semaphores.at[2, slot])

    def start(row, block, slot):
        @pl.when(row < num_rows)
        def _():
            copies.start(row, block, slot, walk.low(row), contexts[row])

            @pl.when(block == walk.first_block(row))
            def _():
                query_copy(row).start()

    def step(state):
        row, block, slot, ahead_row, ahead_block = state
        start(ahead_row, ahead_block, lax.rem(slot + config.buffers - 1, config.buffers))

        @pl.when(block == walk.first_block(row))
        def _():
            query_copy(row).wait()
            top[...] = sinks[...]
            total[...] = jnp.where(sinks[...] > MASKED, 1.0, 0.0)
            acc[...] = jnp.zeros_like(acc)

        copies.wait(block, slot, walk.low(row), contexts[row])
        query = queries.at[lax.rem(row, config.buffers)]
        attend = partial(_attend, query, top, total, acc, cap=config.cap)
        begins, ends = walk.low(row) - block * block_tokens, contexts[row] - block * block_tokens
        _attend_block(pages.at[slot], begins, ends, config.part_pages, attend)
        next_row, next_block = walk.following(row, block)

        @pl.when(next_row != row)
        def _():
            @pl.when(row >= first_row + config.buffers)
            def _():
                output_copy(row - config.buffers).wait()

            for head in range(acc.shape[0]):
                scale = spread(1.0 / total[head], acc.shape[2])
                outputs[lax.rem(row, config.buffers), head] = acc[head] * scale
            output_copy(row).start()

        return (
            next_row,
            next_block,
            lax.rem(slot + 1, config.buffers),
            *walk.following(ahead_row, ahead_block),
        )

    @pl.when(first_row < num_rows)
    def _():
        first = ahead = (first_row, walk.first_block(first_row))
        for slot in range(config.buffers - 1):
            start(*ahead, slot)
            ahead = walk.following(*ahead)
        first = (*first, jnp.int32(0), *ahead)
        lax.while_loop(lambda state: state[0] < num_rows, step, first)

        @pl.loop(jnp.maximum(num_rows - config.buffers, first_row), num_rows)
        def _(row):
            output_copy(row).wait()


def _attend_block(pages, begins, ends, part_pages: int, attend) -> None:
    """Attends positions [begins, ends) of a block: at once where that is all of it, else part by part with a mask."""
    block_tokens = pages.shape[0] * pages.shape[3]
    whole = (begins <= 0) & (ends >= block_tokens)

    @pl.when(whole)
    def _():
        attend(pages, None)

    @pl.when(jnp.logical_not(whole))
    def _():
        part = part_pages * pages.shape[3]

        @pl.loop(jnp.maximum(begins, 0) // part, (jnp.minimum(ends, block_tokens) + part - 1) // part)
        def _(index):
            within = pages.at[pl.ds(index * part_pages, part_pages)]
            attend(within, (begins - index * part, ends - index * part))


def _attend(query, top, total, acc, pages, seen, *, cap):
    """Adds some pages to a row's softmax, head by head.

    query: float32[K, G, L]. top, total: float32[K, G, 128]; acc: float32[K, G, L']. pages: [p, C, K, S, L].
    seen: None (all of them), or the half-open range of positions within the pages that the query sees.
    """
    num_pages, num_slabs, num_heads, page_size, lanes = pages.shape
    tokens, width = num_pages * page_size, acc.shape[2]
    dtype = work_dtype(pages.dtype)
    for head in range(num_heads):
        keys = pages[:, 0, head].astype(dtype).reshape(tokens, lanes)
        values = keys[:, :width]
        if num_slabs == 2:
            values = pages[:, 1, head].astype(dtype).reshape(tokens, lanes)
        logits = product(query[head].astype(dtype), keys, transposed=True)
        if cap is not None:
            logits = cap * jnp.tanh(logits)
        if seen is not None:
            position = lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
            logits = jnp.where((position >= seen[0]) & (position < seen[1]), logits, MASKED)
            # What was never written may be NaN, and 0 times NaN is NaN.
            position = lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
            values = jnp.where((position >= seen[0]) & (position < seen[1]), values, jnp.zeros_like(values))
        old = top[head]
        new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp2(logits - spread(new, tokens))
        shrink = jnp.exp2(old - new)
        top[head] = new
        total[head] = total[head] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        added = product(weights.astype(dtype), values, transposed=False)
        acc[head] = acc[head] * spread(shrink, width) + added
