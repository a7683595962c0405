"""Attention of query tiles on Hopper: the kernel behind prompt chunks over pages and behind dense attention.

A tile is up to two times 64 rows of queries of one sequence, the query heads that share a KV head packed together: row
t * heads + h holds head h of the tile's token t. One persistent block per streaming multiprocessor takes tiles in
turn, the longest first. Its producer warpgroup fetches queries, keys and values by TMA, a few blocks ahead; each of two
consumer warpgroups owns 64 rows. The consumers alternate: while one multiplies the other computes its softmax.

The caller says where a block of keys or values comes from (`Fetch`), so pages and dense arrays share everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_parts import (
    NEGATIVE,
    accumulate,
    along_rows,
    capped,
    clear_outside,
    in_accumulator,
    in_rows,
    iota,
    load_rows,
    matrix,
    measured,
    num_blocks_at_once,
    product_transposed,
    row_iota,
    sink_logits,
    softmax_step,
)

ROWS = 64  # of a consumer: a wgmma tile
COLUMNS = 64  # of the result that are staged at once on their way out
CONSUMERS = 2


@dataclass(frozen=True)
class TileConfig:
    """Sizes of the kernel, all static.

    Attributes:
      kv_tokens: keys per block.
      stages: blocks of keys, and as many of values, in flight.
      num_blocks: persistent blocks, one per streaming multiprocessor.
      alternate: consumers take turns with the tensor cores.
      fetched: places of copies that the producer holds at once.
      consumer_registers, producer_registers: per thread, multiples of 8.
    """

    kv_tokens: int
    stages: int
    num_blocks: int
    alternate: bool = True
    fetched: int = 2
    consumer_registers: int = 240
    producer_registers: int = 24


def tile_config(head_dim: int) -> TileConfig:
    """Blocks of 128 keys where an accumulator of that width fits beside the result's, two stages of both.

    The registers of the three warpgroups sum to what a multiprocessor has. Wide heads leave the producer few.
    """
    config = TileConfig(128 if head_dim <= 128 else 64, 2, num_blocks_at_once())
    if head_dim <= 96:
        config = replace(config, fetched=4, consumer_registers=216, producer_registers=72)
    elif head_dim > 128:
        # Taking turns needs registers that the wide accumulator does not leave: with it the compiler spills 16 bytes.
        config = replace(config, alternate=False)
    return replace(config, **measured("tiles", head_dim))


@dataclass(frozen=True)
class TileShape:
    """What is static about one call.

    Attributes:
      groups: tiles of query heads: KV heads times the tiles that share one (more than one only above 64 query heads).
      heads: query heads per group, at most 64.
      copies: TMA copies per block of keys.
      tree_words: of each token's tree mask, 0 without one.
    """

    groups: int
    heads: int
    head_dim: int
    copies: int
    causal: bool
    window: int | None
    soft_cap: float | None
    has_sinks: bool
    tree_words: int
    config: TileConfig

    @property
    def tokens(self) -> int:
        """Query tokens of one consumer."""
        return ROWS // self.heads

    @property
    def padded_dim(self) -> int:
        return -(-self.head_dim // COLUMNS) * COLUMNS


@dataclass(frozen=True)
class Tile:
    """One tile, as scalars in a kernel, or all tiles, as int32[N] outside.

    Attributes:
      row: what `Fetch` needs to know of the sequence.
      token: the first query token on the flat axis.
      count: query tokens.
      position: of the first query token in its sequence.
      low, high: no query of the tile sees a key outside [low, high).
      new: position of the first token that a tree mask speaks of.
    """

    row: Any
    token: Any
    count: Any
    position: Any
    low: Any
    high: Any
    new: Any

    def pack(self) -> jax.Array:
        """int32[N, 7], the tiles with the most keys first."""
        fields = jnp.stack([getattr(self, name) for name in self.__dataclass_fields__], axis=1)
        return fields[jnp.argsort(self.low - self.high)]


# fetch(row, KV block, group, half, copies, *operands): where the keys (half 0) or values (half 1) of a block come from:
# one matrix for each of `copies`, a range of the block's equal parts.
Fetch = Callable[..., list[Any]]


def run_tiles(
    q: jax.Array,
    tiles: jax.Array,
    num_tiles: jax.Array,
    qk_scale: jax.Array,
    sinks: jax.Array | None,
    tree_mask: jax.Array | None,
    operands: tuple[jax.Array, ...],
    fetch: Fetch,
    shape: TileShape,
    name: str,
) -> jax.Array:
    """Attention of every tile's queries over their sequence's keys.

    Args:
      q: bf16[T, H, D]; H = groups * heads.
      tiles, num_tiles: int32[N, 7] from `Tile.pack`, and how many are live.
      qk_scale: float32[groups], of the logits.
      sinks: float32[H] or None.
      tree_mask: int32[T, tree_words] or None.
      operands: what `fetch` reads, in global memory.

    Returns:
      bf16[T, H, D]; tokens of no live tile get anything.
    """
    num_tokens, num_heads, head_dim = q.shape
    config, groups, heads = shape.config, shape.groups, shape.heads
    # A box of 64 rows that starts at the last token must end inside the array.
    rows = num_tokens * heads + -(num_tokens * heads) % 4 + ROWS * CONSUMERS
    q = q.reshape(num_tokens, groups, heads, head_dim).transpose(1, 0, 2, 3).reshape(groups, -1, head_dim)
    q = jnp.pad(q, ((0, 0), (0, rows - q.shape[1]), (0, 0)))
    extra, extra_scratch = [], {}
    if shape.has_sinks:
        assert sinks is not None
        per_row = sink_logits(sinks, shape.soft_cap).reshape(groups, heads)
        extra.append(per_row[:, jnp.arange(ROWS) % heads])
        extra_scratch["sink_smem"] = plgpu.SMEM((CONSUMERS, ROWS), jnp.float32)
    if shape.tree_words:
        assert tree_mask is not None
        words = jnp.repeat(tree_mask.T, heads, axis=1)
        extra.append(jnp.pad(words, ((0, 0), (0, rows - words.shape[1]))))
        extra_scratch["tree_smem"] = plgpu.SMEM((CONSUMERS, shape.tree_words, ROWS), jnp.int32)
    header = jnp.asarray(num_tiles, jnp.int32).reshape(1)
    kernel = plgpu.kernel(
        partial(_body, shape=shape, fetch=fetch, num_operands=len(operands)),
        out_type=jax.ShapeDtypeStruct((groups, rows, shape.padded_dim), q.dtype),
        grid=(config.num_blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(shape) | extra_scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )
    out = kernel(q, tiles, header, qk_scale, *extra, *operands)
    out = out[:, : num_tokens * heads, :head_dim].reshape(groups, num_tokens, heads, head_dim)
    return out.transpose(1, 0, 2, 3).reshape(num_tokens, num_heads, head_dim)


def _scratch(shape: TileShape) -> dict[str, Any]:
    config, head_dim = shape.config, shape.head_dim
    block = (config.stages, config.kv_tokens, head_dim)
    per_consumer = 1 + int(shape.has_sinks) + shape.tree_words
    return {
        "q_smem": matrix(CONSUMERS, ROWS, head_dim, head_dim=head_dim),
        "k_smem": matrix(*block, head_dim=head_dim),
        "v_smem": matrix(*block, head_dim=head_dim),
        "out_smem": plgpu.SMEM((CONSUMERS, ROWS, COLUMNS), jnp.bfloat16),
        "q_full": plgpu.Barrier(num_arrivals=per_consumer, num_barriers=CONSUMERS),
        "q_free": plgpu.Barrier(num_barriers=CONSUMERS),
        # Of keys, then of values: the phases of one array of barriers share a register.
        "kv_full": plgpu.Barrier(num_arrivals=shape.copies, num_barriers=2 * config.stages),
        "kv_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=2 * config.stages),
        "v_clean": plgpu.Barrier(num_barriers=config.stages),
        "turns": plgpu.Barrier(num_arrivals=CONSUMERS),
    }


@dataclass(frozen=True)
class _Refs:
    """The kernel's arguments by name."""

    q: Any
    tiles: Any
    header: Any
    scale: Any
    sinks: Any
    tree: Any
    operands: tuple[Any, ...]
    out: Any
    scratch: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.scratch[name]
        except KeyError:
            raise AttributeError(name) from None


def _body(*refs, shape: TileShape, fetch: Fetch, num_operands: int, **scratch):
    refs = list(refs)
    q, tiles, header, scale = refs[:4]
    rest = refs[4:]
    sinks = rest.pop(0) if shape.has_sinks else None
    tree = rest.pop(0) if shape.tree_words else None
    known = _Refs(
        q, tiles, header, scale, sinks, tree, tuple(rest[:num_operands]), rest[num_operands], scratch
    )
    config = shape.config
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(config.producer_registers, action="decrease")
        _produce(known, fetch, shape)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(config.consumer_registers, action="increase")
        _consume(known, warpgroup, shape)


def _each_unit(refs: _Refs, shape: TileShape, function: Callable[..., Any]) -> tuple[jax.Array, Any]:
    """Calls function(index, item, tile, group, first KV block, last + 1, KV blocks so far) for each work unit.

    Units go around: forwards in even rounds, backwards in odd ones, so that a block that had a longer tile gets a
    shorter one next. Returns the number of units and of KV blocks.
    """
    config, size = shape.config, shape.config.kv_tokens
    mine, blocks = lax.axis_index("block"), jnp.int32(config.num_blocks)
    total = refs.header[0] * shape.groups
    last_round = lax.div(total, blocks)
    left = total - last_round * blocks
    odd = lax.rem(last_round, jnp.int32(2)) == 1
    place = jnp.where(odd, config.num_blocks - 1 - mine, mine)
    count = last_round + jnp.where(place < left, 1, 0)

    def one(index, done):
        odd = lax.rem(index, jnp.int32(2)) == 1
        work = index * blocks + jnp.where(odd, config.num_blocks - 1 - mine, mine)
        item, group = lax.div(work, jnp.int32(shape.groups)), lax.rem(work, jnp.int32(shape.groups))
        tile = _read_tile(refs, item)
        first = lax.div(tile.low, jnp.int32(size))
        stop = lax.div(tile.high + size - 1, jnp.int32(size))
        function(index, item, tile, group, first, stop, done)
        return done + stop - first

    return count, lax.fori_loop(0, count, one, jnp.int32(0))


def _read_tile(refs: _Refs, item) -> Tile:
    return Tile(*(refs.tiles[item, field] for field in range(len(Tile.__dataclass_fields__))))


def _produce(refs: _Refs, fetch: Fetch, shape: TileShape):
    stages, tokens = shape.config.stages, shape.config.kv_tokens // shape.copies

    def one_tile(index, item, tile, group, first, stop, done):
        for consumer in range(CONSUMERS):
            pl.when(index >= 1)(partial(plgpu.barrier_wait, refs.q_free.at[consumer]))
            rows = pl.ds((tile.token + consumer * shape.tokens) * shape.heads, ROWS)
            full = refs.q_full.at[consumer]
            plgpu.copy_gmem_to_smem(refs.q.at[group, rows], refs.q_smem.at[consumer], full)
            if shape.has_sinks:
                plgpu.copy_gmem_to_smem(refs.sinks.at[group], refs.sink_smem.at[consumer], full)
            for word in range(shape.tree_words):
                plgpu.copy_gmem_to_smem(refs.tree.at[word, rows], refs.tree_smem.at[consumer, word], full)

        def one_block(block, done):
            stage = lax.rem(done, jnp.int32(stages))
            for half, memory in enumerate((refs.k_smem, refs.v_smem)):
                barrier = half * stages + stage
                pl.when(done >= stages)(partial(plgpu.barrier_wait, refs.kv_free.at[barrier]))
                for begin in range(0, shape.copies, shape.config.fetched):
                    copies = range(begin, min(begin + shape.config.fetched, shape.copies))
                    sources = fetch(tile.row, block, group, half, copies, *refs.operands)
                    for i, source in zip(copies, sources):
                        target = memory.at[stage, pl.ds(i * tokens, tokens)]
                        plgpu.copy_gmem_to_smem(source, target, refs.kv_full.at[barrier])
            return done + 1

        lax.fori_loop(first, stop, one_block, done)

    count, done = _each_unit(refs, shape, one_tile)
    # The barriers end with every phase seen, which is also when nothing reads shared memory any more.
    for barrier in range(2 * stages):
        pl.when(done > barrier % stages)(partial(plgpu.barrier_wait, refs.kv_free.at[barrier]))
    for consumer in range(CONSUMERS):
        pl.when(count > 0)(partial(plgpu.barrier_wait, refs.q_free.at[consumer]))


def _consume(refs: _Refs, me, shape: TileShape):
    def meet():
        """Both consumers get here before either goes on. One of them is always half a block ahead."""
        plgpu.barrier_arrive(refs.turns)
        plgpu.barrier_wait(refs.turns)

    def one_tile(index, item, tile, group, first, stop, done):
        plgpu.barrier_wait(refs.q_full.at[me])
        carry = (
            in_rows(jnp.full((ROWS,), NEGATIVE, jnp.float32)),
            in_rows(jnp.zeros((ROWS,), jnp.float32)),
            in_accumulator(jnp.zeros((ROWS, shape.head_dim), jnp.float32)),
        )
        whole = _seen_whole(tile, me, first, stop, shape)
        step = partial(_one_block, refs, me, item, group, done - first, whole, meet, shape)
        if shape.config.alternate:
            pl.when(me == 1)(meet)
        carry = lax.fori_loop(first, stop, step, carry)
        if shape.config.alternate:
            pl.when(me == 0)(meet)
        _finish(refs, me, item, group, carry, shape)

    _each_unit(refs, shape, one_tile)
    plgpu.wait_smem_to_gmem(0)


def _seen_whole(tile: Tile, me, first, stop, shape: TileShape):
    """The KV blocks [begin, end) that every query of this consumer sees whole."""
    size = shape.config.kv_tokens
    nearest = tile.position + me * shape.tokens
    seen = jnp.minimum(nearest + 1, tile.high) if shape.causal else tile.high
    if shape.tree_words:
        seen = jnp.minimum(seen, tile.new)
    begin = first
    if shape.window is not None:
        farthest = nearest + shape.tokens - 1
        begin = lax.div(jnp.maximum(farthest - shape.window + 1, 0) + size - 1, jnp.int32(size))
        if not shape.causal:
            seen = jnp.minimum(seen, nearest + shape.window)
        begin = jnp.clip(begin, first, stop)
    return begin, jnp.clip(lax.div(seen, jnp.int32(size)), begin, stop)


def _one_block(refs: _Refs, me, item, group, done, whole, meet, shape: TileShape, block, carry):
    """One turn of a consumer. What only a block at an edge needs is read there: registers are short."""
    config = shape.config
    start = block * config.kv_tokens
    top, total, sums = carry
    stage = lax.rem(done + block, jnp.int32(config.stages))
    plgpu.barrier_wait(refs.kv_full.at[stage])
    logits = product_transposed(refs.q_smem.at[me], refs.k_smem.at[stage], meet if config.alternate else None)
    plgpu.barrier_arrive(refs.kv_free.at[stage])
    logits = capped(logits, refs.scale[group], shape.soft_cap)
    edge = (block < whole[0]) | (block >= whole[1])

    def mask(logits):
        return jnp.where(_visible(refs, me, _read_tile(refs, item), start, shape), logits, NEGATIVE)

    logits = lax.cond(edge, mask, lambda logits: logits, logits)
    weights, top, total, shrink = softmax_step(logits, top, total)
    sums = sums * along_rows(shrink, sums.shape)
    # Everything of float32 but the sums is dead before the product starts: else it is kept beside it and spills.
    weights, top, total, sums = lax.optimization_barrier((weights, top, total, sums))
    if config.alternate:
        meet()
    plgpu.barrier_wait(refs.kv_full.at[config.stages + stage])
    pl.when(edge)(lambda: _clean_values(refs, me, stage, _read_tile(refs, item), start))
    sums = accumulate(sums, weights, refs.v_smem.at[stage])
    plgpu.barrier_arrive(refs.kv_free.at[config.stages + stage])
    return top, total, sums


def _clean_values(refs: _Refs, me, stage, tile: Tile, start):
    """Consumer 0 clears what no query of the tile sees; consumer 1, for whom this is an edge too, waits for it."""

    @pl.when((start < tile.low) | (start + refs.v_smem.shape[1] > tile.high))
    def _():
        @pl.when(me == 0)
        def _():
            clear_outside(refs.v_smem.at[stage], tile.low - start, tile.high - start)
            plgpu.barrier_arrive(refs.v_clean.at[stage])

        pl.when(me != 0)(partial(plgpu.barrier_wait, refs.v_clean.at[stage]))


def _visible(refs: _Refs, me, tile: Tile, start, shape: TileShape):
    """bool[ROWS, kv_tokens]. The limits are made per row, so that an element costs two comparisons at most."""
    area = (ROWS, shape.config.kv_tokens)
    query = lax.div(row_iota(ROWS), jnp.int32(shape.heads)) + (tile.position + me * shape.tokens)
    ahead = 0 if shape.causal else None if shape.window is None else shape.window - 1
    last = in_rows(jnp.broadcast_to(tile.high - 1, (ROWS,)))
    if ahead is not None:
        last = jnp.minimum(last, query + ahead)
    key = iota(area, 1) + start
    visible = key <= along_rows(last, area)
    if shape.window is not None:
        visible &= key >= along_rows(jnp.maximum(query - (shape.window - 1), tile.low), area)
    if shape.tree_words:
        itself = key == along_rows(query, area)
        visible &= itself | _tree_allows(refs, me, key - tile.new, area, shape)
    return visible


def _tree_allows(refs: _Refs, me, place, area, shape: TileShape):
    """`batch.tree_allows` but for the query itself, with each query's words beside its row."""
    bits = 32 * shape.tree_words
    bit = jnp.clip(place, 0, bits - 1)
    seen = jnp.zeros(area, jnp.int32)
    for index in range(shape.tree_words):
        word = along_rows(load_rows(refs.tree_smem.at[me, index]), area)
        here = lax.shift_right_logical(word, bit & 31) & 1
        seen = jnp.where((bit >= 32 * index) & (bit < 32 * (index + 1)), here, seen)
    return (place < 0) | (place >= bits) | (seen == 1)


def _finish(refs: _Refs, me, item, group, carry, shape: TileShape):
    """Divides by the sums and copies the live tokens' rows out, by powers of two where the tile is not full."""
    top, total, sums = carry
    if shape.has_sinks:
        # The sink is one more logit. The top need not move: where it is far below, the sink has all the weight.
        sink = load_rows(refs.sink_smem.at[me])
        new_top = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.exp2(sink - new_top)
        sums = sums * along_rows(shrink, sums.shape)
    plgpu.barrier_arrive(refs.q_free.at[me])
    total = jnp.where(total == 0.0, 1.0, total)
    sums = sums * along_rows(1.0 / total, sums.shape)
    tile = _read_tile(refs, item)  # again: two loads cost less than registers that are held through the loop
    live = jnp.clip(tile.count - me * shape.tokens, 0, shape.tokens)
    start = (tile.token + me * shape.tokens) * shape.heads
    stage = refs.out_smem.at[me]
    for column in range(0, shape.head_dim, COLUMNS):
        width = min(COLUMNS, shape.head_dim - column)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        stage[:, pl.ds(0, width)] = sums[:, column : column + width].astype(stage.dtype)
        plgpu.commit_smem()

        def send(first, tokens: int, column=column):
            source = stage.at[pl.ds(first * shape.heads, tokens * shape.heads)]
            rows = pl.ds(start + first * shape.heads, tokens * shape.heads)
            plgpu.copy_smem_to_gmem(source, refs.out.at[group, rows, pl.ds(column, COLUMNS)])

        pl.when(live == shape.tokens)(partial(send, 0, shape.tokens))
        tokens = 1 << (shape.tokens - 1).bit_length() >> 1
        while tokens:
            first = live & ~(2 * tokens - 1)
            pl.when((live < shape.tokens) & (live & tokens != 0))(partial(send, first, tokens))
            tokens >>= 1
