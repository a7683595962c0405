"""Decode on Hopper: one query per row, its context split into pieces that fill the chip, and a kernel that joins them.

A piece is a run of KV blocks of one row. One persistent block per streaming multiprocessor takes pieces in turn, each
for one KV head. Its producer warpgroup fetches pages by TMA, several blocks ahead and on into the next piece; two
consumer warpgroups take turns with the blocks, so that one computes its softmax while the other multiplies. The query
heads of a KV head are the rows of the wgmma tile. Each consumer leaves its own part of the result (top, total, values
in float32); `join` adds a row's parts up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

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
    in_vector,
    iota,
    matrix,
    product_transposed,
    sink_logits,
    softmax_step,
)
from pallas_kernels.paged_attention.gpu_config import DecodeConfig
from pallas_kernels.paged_attention.gpu_plan import ITEM_FIELDS, Pieces, copies_of, places_of

TILE = 64  # rows of a wgmma tile
COLUMNS = 64  # of the result that are staged at once on their way out
CONSUMERS = 2
JOIN_UNROLL = 4  # parts fetched at once by `join`


@dataclass(frozen=True)
class DecodeShape:
    """What is static about one decode call.

    Attributes:
      heads: query heads per KV head in one tile, at most 64.
      tiles: tiles that share a KV head (more than one only above 64 query heads per KV head).
    """

    kv_heads: int
    tiles: int
    heads: int
    head_dim: int
    page_size: int
    soft_cap: float | None
    config: DecodeConfig

    @property
    def rows(self) -> int:
        """Rows of the tile that are fetched and kept: whole 8-row tiles of shared memory."""
        return -(-self.heads // 8) * 8

    @property
    def padded_dim(self) -> int:
        """Columns of the parts: `join` reads whole vectors of a warpgroup."""
        return -(-self.head_dim // 128) * 128


def attend_decode(
    q: jax.Array,
    kv: jax.Array,
    pieces: Pieces,
    page_offset: jax.Array,
    qk_scale: jax.Array,
    sinks: jax.Array | None,
    shape: DecodeShape,
) -> jax.Array:
    """Attention of rows with one query each.

    Args:
      q: bf16[R, H, D]; H = kv_heads * tiles * heads.
      kv: bf16[P, 2, K, S, D].
      qk_scale: float32[K], of the logits.
      sinks: float32[H] or None.

    Returns:
      bf16[R, H, D]; zeros in rows that have no piece.
    """
    num_rows, num_heads, head_dim = q.shape
    groups = shape.kv_heads * shape.tiles
    q = q.reshape(num_rows, groups, shape.heads, head_dim).swapaxes(0, 1)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, shape.rows - shape.heads), (0, 0)))
    parts, tops, totals = _run_pieces(q, kv, pieces, page_offset, qk_scale, shape)
    if sinks is None:
        sinks = jnp.full((num_heads,), NEGATIVE, jnp.float32)
    else:
        sinks = sink_logits(sinks, shape.soft_cap)
    joined = _join(parts, tops, totals, pieces, sinks, num_rows, shape)
    return joined[..., :head_dim]


def _run_pieces(q, kv, pieces: Pieces, page_offset, qk_scale, shape: DecodeShape):
    config, head_dim, groups = shape.config, shape.head_dim, q.shape[0]
    pages = kv.reshape(-1, shape.page_size, head_dim)
    slots = CONSUMERS * pieces.items.shape[0]
    part = jax.ShapeDtypeStruct((slots, groups, shape.rows, shape.padded_dim), jnp.float32)
    scalar = jax.ShapeDtypeStruct((slots, groups, shape.rows), jnp.float32)
    stages = config.stages
    copies, _ = copies_of(shape.page_size, config.kv_tokens)
    kernel = plgpu.kernel(
        partial(_decode_body, shape=shape),
        out_type=(part, scalar, scalar),
        grid=(config.num_blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types={
            "q_smem": matrix(2, TILE, head_dim, head_dim=head_dim),
            "k_smem": matrix(stages, config.kv_tokens, head_dim, head_dim=head_dim),
            "v_smem": matrix(stages, config.kv_tokens, head_dim, head_dim=head_dim),
            "out_smem": plgpu.SMEM((CONSUMERS, TILE, COLUMNS), jnp.float32),
            "top_smem": plgpu.SMEM((CONSUMERS, TILE), jnp.float32),
            "total_smem": plgpu.SMEM((CONSUMERS, TILE), jnp.float32),
            "q_full": plgpu.Barrier(num_barriers=2),
            "q_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=2),
            "k_full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            "v_full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            "kv_free": plgpu.Barrier(num_barriers=stages),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="paged_attention_decode",
    )
    header = jnp.stack([pieces.num_items, jnp.asarray(page_offset, jnp.int32)])
    return kernel(q, pages, pieces.table, pieces.items, header, qk_scale)


def _decode_body(
    q_ref,
    pages_ref,
    table_ref,
    items_ref,
    header_ref,
    scale_ref,
    part_ref,
    top_ref,
    total_ref,
    q_smem,
    k_smem,
    v_smem,
    out_smem,
    top_smem,
    total_smem,
    q_full,
    q_free,
    k_full,
    v_full,
    kv_free,
    *,
    shape: DecodeShape,
):
    config = shape.config
    groups = q_ref.shape[0]
    warpgroup = lax.axis_index("warpgroup")
    mine = lax.axis_index("block")
    num_work = header_ref[0] * groups
    # Work units of this block: mine, mine + num_blocks, ... The heads of a piece go to neighbours.
    count = lax.div(jnp.maximum(num_work - mine + config.num_blocks - 1, 0), jnp.int32(config.num_blocks))

    def unit(index):
        work = mine + index * config.num_blocks
        item, group = lax.div(work, jnp.int32(groups)), lax.rem(work, jnp.int32(groups))
        return item, group, [items_ref[item, field] for field in range(ITEM_FIELDS)]

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(config.producer_registers, action="decrease")
        _produce(
            count,
            unit,
            q_ref,
            pages_ref,
            table_ref,
            header_ref[1],
            q_smem,
            k_smem,
            v_smem,
            q_full,
            q_free,
            k_full,
            v_full,
            kv_free,
            shape,
        )

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(config.consumer_registers, action="increase")
        _consume(
            warpgroup,
            count,
            unit,
            scale_ref,
            part_ref,
            top_ref,
            total_ref,
            q_smem,
            k_smem,
            v_smem,
            out_smem.at[warpgroup],
            top_smem.at[warpgroup],
            total_smem.at[warpgroup],
            q_full,
            q_free,
            k_full,
            v_full,
            kv_free,
            shape,
        )


def _produce(
    count,
    unit,
    q_ref,
    pages_ref,
    table_ref,
    page_offset,
    q_smem,
    k_smem,
    v_smem,
    q_full,
    q_free,
    k_full,
    v_full,
    kv_free,
    shape: DecodeShape,
):
    """Keeps `stages` blocks of keys and values in flight, over the borders of work units."""
    stages, size = shape.config.stages, shape.config.kv_tokens
    copies, tokens = copies_of(shape.page_size, size)

    def one_unit(index, done):
        _, group, (row, first, last, _, _) = unit(index)
        slot = lax.rem(index, jnp.int32(2))
        pl.when(index >= 2)(lambda: plgpu.barrier_wait(q_free.at[slot]))
        plgpu.copy_gmem_to_smem(q_ref.at[group, row], q_smem.at[slot, pl.ds(0, shape.rows)], q_full.at[slot])
        head = lax.div(group, jnp.int32(shape.tiles))

        def one_block(block, done):
            stage = lax.rem(done, jnp.int32(stages))
            # All ids before any copy, so that they are fetched together.
            places = places_of(table_ref, row, block, range(copies), shape.page_size, size)
            pl.when(done >= stages)(lambda: plgpu.barrier_wait(kv_free.at[stage]))
            for memory, full, half in ((k_smem, k_full, 0), (v_smem, v_full, 1)):
                for i, (page, slot) in enumerate(places):
                    source = pages_ref.at[((page + page_offset) * 2 + half) * shape.kv_heads + head, slot]
                    target = memory.at[stage, pl.ds(i * tokens, tokens)]
                    plgpu.copy_gmem_to_smem(source, target, full.at[stage])
            return done + 1

        return lax.fori_loop(first, last, one_block, done)

    done = lax.fori_loop(0, count, one_unit, jnp.int32(0))
    # The barriers end with every phase seen, which is also when nothing reads shared memory any more.
    for used, free, number in ((done, kv_free, stages), (count, q_free, 2)):
        for slot in range(number):
            pl.when(used > slot)(partial(plgpu.barrier_wait, free.at[slot]))


def _consume(
    me,
    count,
    unit,
    scale_ref,
    part_ref,
    top_ref,
    total_ref,
    q_smem,
    k_smem,
    v_smem,
    out_smem,
    top_smem,
    total_smem,
    q_full,
    q_free,
    k_full,
    v_full,
    kv_free,
    shape: DecodeShape,
):
    """Takes every other block. `stages` is even, so a stage always goes to the same consumer."""
    config, head_dim = shape.config, shape.head_dim
    size = config.kv_tokens

    def one_unit(index, done):
        item, group, (_, first, last, low, high) = unit(index)
        slot = lax.rem(index, jnp.int32(2))
        scale = scale_ref[lax.div(group, jnp.int32(shape.tiles))]
        plgpu.barrier_wait(q_full.at[slot])
        skipped = lax.rem(me + done, jnp.int32(2))  # 1 when the first block is the other's

        def one_block(turn, carry):
            top, total, sums = carry
            block = first + skipped + 2 * turn
            stage = lax.rem(done + block - first, jnp.int32(config.stages))
            plgpu.barrier_wait(k_full.at[stage])
            logits = capped(product_transposed(q_smem.at[slot], k_smem.at[stage]), scale, shape.soft_cap)
            position = iota((TILE, size), 1) + block * size
            logits = jnp.where((position >= low) & (position < high), logits, NEGATIVE)
            weights, top, total, shrink = softmax_step(logits, top, total)
            plgpu.barrier_wait(v_full.at[stage])
            edge = (block * size < low) | ((block + 1) * size > high)
            pl.when(edge)(lambda: clear_outside(v_smem.at[stage], low - block * size, high - block * size))
            sums = accumulate(sums * along_rows(shrink, sums.shape), weights, v_smem.at[stage])
            plgpu.barrier_arrive(kv_free.at[stage])
            return top, total, sums

        start = (
            in_rows(jnp.full((TILE,), NEGATIVE, jnp.float32)),
            in_rows(jnp.zeros((TILE,), jnp.float32)),
            in_accumulator(jnp.zeros((TILE, head_dim), jnp.float32)),
        )
        turns = lax.div(last - first - skipped + 1, jnp.int32(2))
        top, total, sums = lax.fori_loop(0, turns, one_block, start)
        plgpu.barrier_arrive(q_free.at[slot])

        place = (item * CONSUMERS + me, group)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        top_smem[...], total_smem[...] = top, total
        for column in range(0, head_dim, COLUMNS):
            width = min(COLUMNS, head_dim - column)
            if column:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[:, pl.ds(0, width)] = sums[:, column : column + width]
            plgpu.commit_smem()
            if not column:
                plgpu.copy_smem_to_gmem(top_smem.at[pl.ds(0, shape.rows)], top_ref.at[place])
                plgpu.copy_smem_to_gmem(total_smem.at[pl.ds(0, shape.rows)], total_ref.at[place])
            plgpu.copy_smem_to_gmem(
                out_smem.at[pl.ds(0, shape.rows)], part_ref.at[(*place, slice(None), pl.ds(column, COLUMNS))]
            )
        return done + last - first

    lax.fori_loop(0, count, one_unit, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _join(parts, tops, totals, pieces: Pieces, sinks, num_rows: int, shape: DecodeShape):
    """Adds up the parts of each row: bf16[R, H, padded_dim]."""
    groups = parts.shape[1]
    num_heads = groups * shape.heads
    kernel = plgpu.kernel(
        partial(_join_body, shape=shape),
        out_type=jax.ShapeDtypeStruct((num_rows, num_heads, shape.padded_dim), jnp.bfloat16),
        grid=(num_rows, num_heads),
        grid_names=("row", "head"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_attention_join",
    )
    return kernel(parts, tops, totals, pieces.row_items, sinks)


def _join_body(part_ref, top_ref, total_ref, row_items_ref, sinks_ref, out_ref, *, shape: DecodeShape):
    row, head = lax.axis_index("row"), lax.axis_index("head")
    group, place = lax.div(head, jnp.int32(shape.heads)), lax.rem(head, jnp.int32(shape.heads))
    first, stop = CONSUMERS * row_items_ref[row], CONSUMERS * row_items_ref[row + 1]

    def some(index, carry):
        top, total, sums = carry
        slots = [first + index * JOIN_UNROLL + i for i in range(JOIN_UNROLL)]
        live = [slot < stop for slot in slots]
        slots = [jnp.minimum(slot, stop - 1) for slot in slots]
        tops = [jnp.where(on, top_ref[slot, group, place], NEGATIVE) for slot, on in zip(slots, live)]
        totals = [total_ref[slot, group, place] for slot in slots]
        values = [part_ref[slot, group, place] for slot in slots]
        new_top = top
        for other in tops:
            new_top = jnp.maximum(new_top, other)
        shrink = jnp.exp2(top - new_top)
        total, sums = total * shrink, sums * shrink
        for on, part_top, part_total, value in zip(live, tops, totals, values):
            weight = jnp.where(on, jnp.exp2(part_top - new_top), 0.0)
            total, sums = total + weight * part_total, sums + weight * value
        return new_top, total, sums

    sink = sinks_ref[head]
    start = (
        sink,
        jnp.where(sink > NEGATIVE, 1.0, 0.0),
        in_vector(jnp.zeros((shape.padded_dim,), jnp.float32)),
    )
    count = lax.div(stop - first + JOIN_UNROLL - 1, jnp.int32(JOIN_UNROLL))
    _, total, sums = lax.fori_loop(0, count, some, start)
    out_ref[row, head] = (sums / jnp.where(total == 0.0, 1.0, total)).astype(out_ref.dtype)
