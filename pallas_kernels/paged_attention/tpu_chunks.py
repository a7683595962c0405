"""Prompt chunks and verification rows on a TPU: tiles of one row's queries against blocks of its pages.

A tile is `tile` query tokens of one row and all its heads; a tile of few tokens takes a smaller static size, since its
cost is that of passing keys and values through the matrix units. Within a tile the rows of a KV head are ordered by
query head, then token, so a mask is made once and serves the whole group. The blocks of all tiles form one sequence and
are copied ahead as in `tpu_decode`. Blocks that every query of the tile sees whole are attended without a mask.

Queries come and results go in whole tiles: what a tile writes behind its row's last token belongs to the tiles after it,
which write later. Each tile's results are on their way to HBM before those of the next are sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.batch import tree_allows
from pallas_kernels.paged_attention.tpu_pages import LANES, MASKED, BlockCopies, product, spread
from pallas_kernels.paged_attention.tpu_walk import Place, TileWalk

FIRST_ROW, ROWS, OFFSET = 0, 1, 2  # places in `meta`


@dataclass(frozen=True)
class ChunkConfig:
    """What is static in the kernel; see `DecodeConfig` for window, cap, row_pages and cores.

    Attributes:
      tile, small_tile: query tokens per tile, and of a tile with so few; powers of two.
      block_pages, buffers: pages per block, and how many blocks are in VMEM at once.
    """

    tile: int
    small_tile: int
    block_pages: int
    buffers: int
    window: int | None
    cap: float | None
    row_pages: int
    cores: int
    vmem_bytes: int


def attend_chunks(
    q: jax.Array,
    pages: jax.Array,
    query_starts: jax.Array,
    context_lens: jax.Array,
    table: jax.Array,
    meta: jax.Array,
    sinks: jax.Array,
    tree: jax.Array | None,
    config: ChunkConfig,
) -> jax.Array:
    """Softmax attention of rows with any number of query tokens.

    Args:
      q: float32[cores, N, H, L], each core's own H heads, scaled (by log2 e too); N at least `tile` more than the
        tokens there are.
      pages: [P, C, K, S, L].
      query_starts: int32[R + 1]. context_lens: int32[R]. table: int32[R * MP].
      meta: int32[3]: rows [meta[FIRST_ROW], meta[ROWS]) are attended, meta[OFFSET] is added to page ids.
      sinks: float32[cores * H, 1, 128], base-2 logits, equal lanes; MASKED where there is none.
      tree: int32[N, W, 128], equal lanes, tree masks as in `RaggedBatch`; or None.

    Returns:
      float32[cores, N, H, L]; tokens of other rows are anything.
    """
    _, num_slabs, num_kv_heads, page_size, lanes = pages.shape
    num_heads = q.shape[2]
    num_kv_heads //= config.cores
    stack = config.tile * (num_heads // num_kv_heads)
    state = pltpu.VMEM((num_kv_heads, stack, LANES), jnp.float32)
    work_dtype = jnp.float32 if pages.dtype == jnp.float32 else jnp.bfloat16
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    words = () if tree is None else (tree,)
    return pl.pallas_call(
        partial(_kernel, config=config, has_tree=tree is not None),
        name="paged_attention_chunks",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(config.cores,),
            in_specs=[
                pl.BlockSpec((num_heads, 1, LANES), lambda core, *_: (core, 0, 0)),
                hbm,
                hbm,
                *(hbm for _ in words),
            ],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM(
                    (config.buffers, config.block_pages, num_slabs, num_kv_heads, page_size, lanes),
                    pages.dtype,
                ),
                pltpu.VMEM((config.buffers, config.tile, num_heads, lanes), jnp.float32),
                pltpu.VMEM((2, config.tile, num_heads, lanes), jnp.float32),
                pltpu.VMEM((num_kv_heads, stack, lanes), work_dtype),
                state,
                state,
                pltpu.VMEM((num_kv_heads, stack, lanes), jnp.float32),
                pltpu.VMEM((config.tile, config.block_pages * page_size), jnp.float32),
                pltpu.SemaphoreType.DMA((3, config.buffers)),
                *(pltpu.VMEM((config.buffers, config.tile, *x.shape[1:]), jnp.int32) for x in words),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=config.vmem_bytes, disable_bounds_checks=True),
    )(meta, query_starts, context_lens, table, sinks, q, pages, *words)


@dataclass(frozen=True)
class TileCopies:
    """Brings tiles of queries (and of their tree masks) and sends tiles of results.

    q, out: float32[cores, N, H, L] in HBM; queries [B, tile, H, L] and outputs [2, tile, H, L] in VMEM. tree: int32
    [N, W, 128] in HBM and words [B, tile, W, 128] in VMEM, or None. semaphores: DMA [3, B]; the first row is not ours.
    """

    q: Any
    queries: Any
    outputs: Any
    out: Any
    tree: Any
    words: Any
    semaphores: Any
    core: Any

    def arriving(self, token: Any, count: Any, size: int) -> list[Any]:
        """The copies for the tile that comes after `count` others."""
        slot = lax.rem(count, self.queries.shape[0])
        source, target, semaphore = pl.ds(token, size), pl.ds(0, size), self.semaphores.at[1, slot]
        found = [
            pltpu.make_async_copy(self.q.at[self.core, source], self.queries.at[slot, target], semaphore)
        ]
        if self.tree is not None:
            words = self.words.at[slot, target]
            found.append(pltpu.make_async_copy(self.tree.at[source], words, semaphore))
        return found

    def leaving(self, token: Any, slot: Any, size: int) -> Any:
        source, target = self.outputs.at[slot, pl.ds(0, size)], self.out.at[self.core, pl.ds(token, size)]
        return pltpu.make_async_copy(source, target, self.semaphores.at[2, 0])


def _kernel(meta, starts, contexts, table, sinks, q_hbm, pool, *rest, config: ChunkConfig, has_tree: bool):
    tree_hbm, rest = (rest[0], rest[1:]) if has_tree else (None, rest)
    out_hbm, pages, queries, outputs, stacked, top, total, acc, seen, semaphores, *words = rest
    softmax = (stacked, top, total, acc, seen, sinks)
    core, tile_words = pl.program_id(0), words[0] if has_tree else None
    copies = BlockCopies(
        table, config.row_pages, meta[OFFSET], pool, pages, semaphores.at[0], core * acc.shape[0]
    )
    tiles = TileCopies(q_hbm, queries, outputs, out_hbm, tree_hbm, tile_words, semaphores, core)
    block_tokens = config.block_pages * pool.shape[3]
    walk = TileWalk(starts, contexts, meta[ROWS], config.tile, config.small_tile, block_tokens, config.window)

    def for_size(small, body):
        for size, wanted in ((config.small_tile, small), (config.tile, jnp.logical_not(small))):
            pl.when(wanted)(partial(body, size))

    def start_tile(at, size):
        for copy in tiles.arriving(walk.token(at), at.count, size):
            copy.start()

    def start(at, slot):
        @pl.when(at.row < walk.num_rows)
        def _():
            low, end, _ = walk.span(at.row, at.offset)
            copies.start(at.row, at.block, slot, low, end)
            pl.when(walk.begins_tile(at))(lambda: for_size(walk.is_small(at), partial(start_tile, at)))

    def step(state):
        at, ahead, slot, sent_small = state
        start(ahead, lax.rem(slot + config.buffers - 1, config.buffers))
        low, end, _ = walk.span(at.row, at.offset)
        small, after = walk.is_small(at), walk.following(at)
        ends = after.count != at.count
        query_slot = lax.rem(at.count, config.buffers)

        def process(size):
            @pl.when(walk.begins_tile(at))
            def _():
                for copy in tiles.arriving(walk.token(at), at.count, size):
                    copy.wait()
                _load_tile(queries.at[query_slot], softmax, size)

            copies.wait(at.block, slot, low, end)
            own_words = tile_words.at[query_slot] if tile_words is not None else None
            _attend_block(pages.at[slot], softmax, size, config.cap, walk, at, own_words)

            @pl.when(ends)
            def _():
                out_slot = lax.rem(at.count, 2)
                _store_tile(outputs.at[out_slot], softmax, size)

                @pl.when(at.count > 0)
                def _():
                    for_size(sent_small, lambda sent: tiles.leaving(0, 0, sent).wait())

                tiles.leaving(walk.token(at), out_slot, size).start()

        for_size(small, process)
        next_slot = lax.rem(slot + 1, config.buffers)
        return after, walk.following(ahead), next_slot, jnp.where(ends, small, sent_small)

    first = walk.from_row(meta[FIRST_ROW], jnp.int32(0))

    @pl.when(first.row < walk.num_rows)
    def _():
        ahead = first
        for slot in range(config.buffers - 1):
            start(ahead, slot)
            ahead = walk.following(ahead)
        state = (first, ahead, jnp.int32(0), jnp.bool_(False))
        *_, sent_small = lax.while_loop(lambda state: state[0].row < walk.num_rows, step, state)
        for_size(sent_small, lambda sent: tiles.leaving(0, 0, sent).wait())


def _attend_block(pages, softmax, size: int, cap: float | None, walk: TileWalk, at: Place, words) -> None:
    """Attends a block for the first `size` queries of a tile: without a mask where every query sees all of it."""
    low, end, position = walk.span(at.row, at.offset)
    base, tokens = at.block * walk.block_tokens, walk.block_tokens
    # Not past the first query's position (a tree's own tokens need their mask), not behind the last one's window.
    whole = base + tokens <= (position + 1 if words is None else walk.first_new(at.row))
    if walk.window:
        whole &= base >= end - walk.window

    @pl.when(whole)
    def _():
        _attend(pages, softmax, size, cap, None)

    @pl.when(jnp.logical_not(whole))
    def _():
        # Rows of the tile behind its row's last token do as the last one does: their results are finite.
        index = jnp.minimum(lax.broadcasted_iota(jnp.int32, (size, tokens), 0), end - 1 - position)
        query, key = position + index, base + lax.broadcasted_iota(jnp.int32, (size, tokens), 1)
        visible = key <= query
        if walk.window:
            visible &= query - key < walk.window
        if words is not None:
            first_new = walk.first_new(at.row)
            own = [spread(words[:size, w, :], tokens) for w in range(words.shape[1])]
            visible &= tree_allows(own, key - first_new, query - first_new)
        softmax[4][:size, :] = jnp.where(visible, 1.0, 0.0)
        _attend(pages, softmax, size, cap, (low - base, end - base))


def _load_tile(queries, softmax, size: int) -> None:
    """Orders a tile's queries by KV head, query head and token, and starts their softmax."""
    stacked, top, total, acc, _, sinks = softmax
    num_kv_heads, _, lanes = stacked.shape
    group = queries.shape[1] // num_kv_heads

    @pl.loop(0, num_kv_heads)
    def _(kv_head):
        for index in range(group):
            head, rows = kv_head * group + index, pl.ds(index * size, size)
            stacked[kv_head, rows, :] = queries[:size, head, :].astype(stacked.dtype)
            sink = jnp.broadcast_to(sinks[head], (size, LANES))
            top[kv_head, rows, :] = sink
            total[kv_head, rows, :] = jnp.where(sink > MASKED, 1.0, 0.0)
            acc[kv_head, rows, :] = jnp.zeros((size, lanes), jnp.float32)


def _store_tile(outputs, softmax, size: int) -> None:
    """Divides by the softmax's sums, and puts the results back in the order of tokens."""
    _, _, total, acc, _, _ = softmax
    num_kv_heads, _, lanes = acc.shape
    group = outputs.shape[1] // num_kv_heads

    @pl.loop(0, num_kv_heads)
    def _(kv_head):
        for index in range(group):
            rows = pl.ds(index * size, size)
            scale = 1.0 / total[kv_head, rows, :]
            outputs[:size, kv_head * group + index, :] = acc[kv_head, rows, :] * spread(scale, lanes)


def _attend(pages, softmax, size: int, cap: float | None, fetched) -> None:
    """Adds a block to a tile's softmax, one KV head after another.

    pages: [BP, C, K, S, L]. fetched: None where every query sees the whole block; else the half-open range of
    positions within it that any query may see, and `seen` says which query sees what.
    """
    stacked, top, total, acc, seen, _ = softmax
    num_pages, num_slabs, num_heads, page_size, lanes = pages.shape
    tokens, group = num_pages * page_size, stacked.shape[1] // seen.shape[0]
    rows = pl.ds(0, group * size)

    @pl.loop(0, num_heads)
    def _(head):
        keys = pages[:, 0, head].astype(stacked.dtype).reshape(tokens, lanes)
        values = keys if num_slabs == 1 else pages[:, 1, head].astype(stacked.dtype).reshape(tokens, lanes)
        logits = product(stacked[head, rows, :], keys, transposed=True)
        if cap is not None:
            logits = cap * jnp.tanh(logits)
        if fetched is not None:
            visible = (seen[:size, :] > 0.0)[None]
            logits = logits.reshape(group, size, tokens)
            logits = jnp.where(visible, logits, MASKED).reshape(group * size, tokens)
            # What was never written may be NaN, and 0 times NaN is NaN.
            at = lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
            values = jnp.where((at >= fetched[0]) & (at < fetched[1]), values, jnp.zeros_like(values))
        old = top[head, rows, :]
        new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp2(logits - spread(new, tokens))
        shrink = jnp.exp2(old - new)
        top[head, rows, :] = new
        total[head, rows, :] = total[head, rows, :] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        added = product(weights.astype(stacked.dtype), values, transposed=False)
        acc[head, rows, :] = acc[head, rows, :] * spread(shrink, lanes) + added
