"""Prompt chunks and verification rows on a TPU: tiles of one row's queries against blocks of its pages.

A tile is `tile` query tokens of one row and all its heads; a tile of few tokens takes a smaller static size, since its
cost is that of passing keys and values through the matrix units. Within a tile the rows of a KV head are ordered by
query head, then token, so a mask is made once and serves the whole group. With one KV head and whole tiles of query
heads they are ordered by token, then head, as they come: nothing is moved, so they come and go in half the bytes where
the products take bfloat16. The blocks of all tiles form one sequence and
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
from pallas_kernels.paged_attention.tpu_pages import LANES, MASKED, BlockCopies, product, spread, work_dtype
from pallas_kernels.paged_attention.tpu_walk import Place, TileWalk

FIRST_ROW, ROWS, OFFSET = 0, 1, 2  # places in `meta`


@dataclass(frozen=True)
class ChunkConfig:
    """What is static in the kernel; see `DecodeConfig` for window, cap, row_pages and value_lanes.

    Attributes:
      cores: 2 where a device is two cores: they share the KV heads, or the query heads of a single one.
      by_token: rows are ordered by token, then query head. For one KV head, and query heads of whole tiles.
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
    value_lanes: int
    by_token: bool


def attend_chunks(
    q: jax.Array,
    pages: jax.Array,
    query_starts: jax.Array,
    context_lens: jax.Array,
    table: jax.Array,
    meta: jax.Array,
    sinks: jax.Array,
    tree: jax.Array | None,
    out_dtype: jnp.dtype,
    config: ChunkConfig,
) -> jax.Array:
    """Softmax attention of rows with any number of query tokens.

    Args:
      q: float32[cores, N, H, L], each core's own H heads, scaled (by log2 e too); N at least `tile` more than the
        tokens there are. By token: of `work_dtype`.
      pages: [P, C, K, S, L].
      query_starts: int32[R + 1]. context_lens: int32[R]. table: int32[R * MP].
      meta: int32[3]: rows [meta[FIRST_ROW], meta[ROWS]) are attended, meta[OFFSET] is added to page ids.
      sinks: float32[cores * H, 1, 128], base-2 logits, equal lanes; MASKED where there is none. By token:
        [cores, H, 128].
      tree: int32[N, W, 128], equal lanes, tree masks as in `RaggedBatch`; or None.

    Returns:
      out_dtype[cores, N, H, L']; tokens of other rows are anything. out_dtype is float32 but by token.
    """
    _, num_slabs, num_kv_heads, page_size, lanes = pages.shape
    num_heads = q.shape[2]
    num_kv_heads = max(num_kv_heads // config.cores, 1)
    stack = config.tile * (num_heads // num_kv_heads)
    state = pltpu.VMEM((num_kv_heads, stack, LANES), jnp.float32)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    words = () if tree is None else (tree,)
    return pl.pallas_call(
        partial(_kernel, config=config, has_tree=tree is not None),
        name="paged_attention_chunks",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(config.cores,),
            in_specs=[
                pl.BlockSpec(
                    (sinks.shape[0] // config.cores, *sinks.shape[1:]), lambda core, *_: (core, 0, 0)
                ),
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
                pltpu.VMEM((config.buffers, config.tile, num_heads, lanes), q.dtype),
                pltpu.VMEM((2, config.tile, num_heads, config.value_lanes), out_dtype),
                pltpu.VMEM((num_kv_heads, stack, lanes), work_dtype(pages.dtype)),
                state,
                state,
                pltpu.VMEM((num_kv_heads, stack, config.value_lanes), jnp.float32),
                pltpu.VMEM((config.tile, config.block_pages * page_size), jnp.float32),
                pltpu.SemaphoreType.DMA((3, config.buffers)),
                *(pltpu.VMEM((config.buffers, config.tile, *x.shape[1:]), jnp.int32) for x in words),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((*q.shape[:3], config.value_lanes), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=config.vmem_bytes,
            disable_bounds_checks=True,
        ),
    )(meta, query_starts, context_lens, table, sinks, q, pages, *words)


@dataclass(frozen=True)
class TileCopies:
    """Brings tiles of queries (and of their tree masks) and sends tiles of results.

    q, out: [cores, N, H, L or L'] in HBM; queries [B, tile, H, L] and outputs [2, tile, H, L'] in VMEM. tree: int32
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


@dataclass(frozen=True)
class Softmax:
    """A tile's softmax, in VMEM: M rows (queries of all heads) per KV head.

    stacked: work_dtype[K, M, L], the queries. top, total: float32[K, M, 128]; acc: float32[K, M, L']. seen:
    float32[tile, tokens], 1 where a query sees a position of the block. sinks: as `attend_chunks` takes them.
    """

    stacked: Any
    top: Any
    total: Any
    acc: Any
    seen: Any
    sinks: Any
    config: ChunkConfig


def _kernel(meta, starts, contexts, table, sinks, q_hbm, pool, *rest, config: ChunkConfig, has_tree: bool):
    tree_hbm, rest = (rest[0], rest[1:]) if has_tree else (None, rest)
    out_hbm, pages, queries, outputs, stacked, top, total, acc, seen, semaphores, *words = rest
    softmax = Softmax(stacked, top, total, acc, seen, sinks, config)
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
            _attend_block(pages.at[slot], softmax, size, walk, at, own_words)

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


def _attend_block(pages, softmax: Softmax, size: int, walk: TileWalk, at: Place, words) -> None:
    """Attends a block for the first `size` queries of a tile: without a mask where every query sees all of it."""
    low, end, position = walk.span(at.row, at.offset)
    base, tokens = at.block * walk.block_tokens, walk.block_tokens
    # Not past the first query's position (a tree's own tokens need their mask), not behind the last one's window.
    whole = base + tokens <= (position + 1 if words is None else walk.first_new(at.row))
    if walk.window:
        whole &= base >= end - walk.window

    @pl.when(whole)
    def _():
        _attend(pages, softmax, size, None)

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
        softmax.seen[:size, :] = jnp.where(visible, 1.0, 0.0)
        _attend(pages, softmax, size, (low - base, end - base))


def _load_tile(queries, softmax: Softmax, size: int) -> None:
    """Orders a tile's queries by KV head, query head and token, and starts their softmax."""
    stacked, top, total, acc, sinks = (
        softmax.stacked,
        softmax.top,
        softmax.total,
        softmax.acc,
        softmax.sinks,
    )
    num_kv_heads, _, lanes = stacked.shape
    group = queries.shape[1] // num_kv_heads

    def begin(kv_head, rows, query, sink):
        stacked[kv_head, rows, :] = query.astype(stacked.dtype)
        top[kv_head, rows, :] = sink
        total[kv_head, rows, :] = jnp.where(sink > MASKED, 1.0, 0.0)
        acc[kv_head, rows, :] = jnp.zeros((sink.shape[0], acc.shape[2]), jnp.float32)

    if softmax.config.by_token:
        sink = jnp.broadcast_to(sinks[...], (size, group, LANES)).reshape(size * group, LANES)
        begin(0, pl.ds(0, size * group), queries[:size].reshape(size * group, lanes), sink)
        return

    @pl.loop(0, num_kv_heads)
    def _(kv_head):
        for index in range(group):
            head = kv_head * group + index
            sink = jnp.broadcast_to(sinks[head], (size, LANES))
            begin(kv_head, pl.ds(index * size, size), queries[:size, head, :], sink)


def _store_tile(outputs, softmax: Softmax, size: int) -> None:
    """Divides by the softmax's sums, and puts the results back in the order of tokens."""
    total, acc = softmax.total, softmax.acc
    num_kv_heads, _, lanes = acc.shape
    group = outputs.shape[1] // num_kv_heads

    def result(kv_head, rows):
        scale = 1.0 / total[kv_head, rows, :]
        return (acc[kv_head, rows, :] * spread(scale, lanes)).astype(outputs.dtype)

    if softmax.config.by_token:
        outputs[:size] = result(0, pl.ds(0, size * group)).reshape(size, group, lanes)
        return

    @pl.loop(0, num_kv_heads)
    def _(kv_head):
        for index in range(group):
            rows = pl.ds(index * size, size)
            outputs[:size, kv_head * group + index, :] = result(kv_head, rows)


def _attend(pages, softmax: Softmax, size: int, fetched) -> None:
    """Adds a block to a tile's softmax, one KV head after another.

    pages: [BP, C, K, S, L]. fetched: None where every query sees the whole block; else the half-open range of
    positions within it that any query may see, and `seen` says which query sees what.
    """
    stacked, top, total, acc = softmax.stacked, softmax.top, softmax.total, softmax.acc
    num_pages, num_slabs, num_heads, page_size, lanes = pages.shape
    tokens, width, cap = num_pages * page_size, acc.shape[2], softmax.config.cap
    group = stacked.shape[1] // softmax.config.tile
    rows = pl.ds(0, group * size)

    @pl.loop(0, num_heads)
    def _(head):
        keys = pages[:, 0, head].astype(stacked.dtype).reshape(tokens, lanes)
        values = keys[:, :width]
        if num_slabs == 2:
            values = pages[:, 1, head].astype(stacked.dtype).reshape(tokens, lanes)
        logits = product(stacked[head, rows, :], keys, transposed=True)
        if cap is not None:
            logits = cap * jnp.tanh(logits)
        if fetched is not None:
            logits = _masked(logits, softmax.seen[:size, :], softmax.config.by_token)
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
        acc[head, rows, :] = acc[head, rows, :] * spread(shrink, width) + added


def _masked(logits: jax.Array, seen: jax.Array, by_token: bool) -> jax.Array:
    """logits [M, tokens] of a group of heads; seen [size, tokens]."""
    size, tokens = seen.shape
    if by_token:
        logits, visible = logits.reshape(size, -1, tokens), (seen > 0.0)[:, None]
    else:
        logits, visible = logits.reshape(-1, size, tokens), (seen > 0.0)[None]
    return jnp.where(visible, logits, MASKED).reshape(-1, tokens)
