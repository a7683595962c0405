"""Paged attention in plain XLA: the fast path on CPU, and the path of devices that no kernel serves.

KV layout: [P, S, 2, K, D]. One token's K and V for all heads are one contiguous slice, so a write is one small copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from pallas_kernels.paged_attention.batch import KVSpec, RaggedBatch

NEGATIVE = -1e30  # stands for minus infinity where a difference of two of them must stay finite
DECODE_BLOCK = 64  # KV tokens per step of the decode loop
TILE = 64  # queries per tile of a prompt chunk
TILE_BLOCK = 128  # KV tokens per step of a tile's loop


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """What every layer of a step needs and no layer changes.

    Attributes:
      batch: the step's rows.
      pages, slots: int32[T]. Where each token's KV goes.
      tile_rows, tile_starts: int32[T // TILE + R]. The row and the first flat token of each tile of queries.
      num_tiles: int32[]. Live tiles.
    """

    batch: RaggedBatch
    pages: jax.Array
    slots: jax.Array
    tile_rows: jax.Array
    tile_starts: jax.Array
    num_tiles: jax.Array


def why_not(spec: KVSpec) -> str | None:
    return None


def kv_shape(spec: KVSpec) -> jax.ShapeDtypeStruct:
    shape = (spec.num_pages, spec.page_size, 2, spec.num_kv_heads, spec.head_dim)
    return jax.ShapeDtypeStruct(shape, spec.dtype)


def kv_partition_spec(tensor_axis: str | None) -> PartitionSpec:
    return PartitionSpec(None, None, None, tensor_axis, None)


def kv_spec(kv) -> KVSpec | None:
    if getattr(kv, "ndim", None) != 5 or kv.shape[2] != 2:
        return None
    pages, page_size, _, heads, head_dim = kv.shape
    return KVSpec(pages, page_size, heads, head_dim, kv.dtype)


def prepare(batch: RaggedBatch, num_tokens: int, spec: KVSpec) -> Plan:
    pages, slots = batch.token_slots(num_tokens, spec.page_size)
    row = jnp.arange(batch.max_rows, dtype=jnp.int32)
    length = batch.query_starts[1:] - batch.query_starts[:-1]
    tiles = jnp.where(row < batch.num_decode_rows, 0, -(-length // TILE))
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    item = jnp.arange(num_tokens // TILE + batch.max_rows, dtype=jnp.int32)
    tile_rows = jnp.minimum(jnp.sum(ends[None] <= item[:, None], axis=1, dtype=jnp.int32), batch.max_rows - 1)
    tile_starts = batch.query_starts[tile_rows] + (item - (ends - tiles)[tile_rows]) * TILE
    return Plan(batch, pages, slots, tile_rows, tile_starts, ends[-1])


def write_kv(kv, k, v, plan: Plan, *, page_offset):
    new = jnp.stack([k, v], axis=1).astype(kv.dtype)[:, None, None]

    def write(token, kv):
        at = (plan.pages[token] + page_offset, plan.slots[token], 0, 0, 0)
        return lax.dynamic_update_slice(kv, new[token], at)

    return lax.fori_loop(0, plan.batch.num_tokens, write, kv)


def attend(q, kv, plan: Plan, *, page_offset, scale, sliding_window, soft_cap, sinks):
    batch = plan.batch
    run = partial(
        _attend_rows, kv=kv, page_offset=page_offset, window=sliding_window, soft_cap=soft_cap, sinks=sinks
    )
    scaled = q.astype(jnp.float32) * scale
    rows = min(batch.max_rows, q.shape[0])
    live = jnp.arange(rows) < batch.num_decode_rows
    last = jnp.where(live, batch.context_lens[:rows], 0) - 1
    output = run(scaled[:rows, None], last[:, None], batch.page_table[:rows], block=DECODE_BLOCK)[:, 0]
    if batch.decode_only:
        return output.astype(q.dtype)
    output = jnp.pad(output, ((0, q.shape[0] + TILE - rows), (0, 0), (0, 0)))
    padded = jnp.pad(scaled, ((0, TILE), (0, 0), (0, 0)))

    def one_tile(item, output):
        row, start = plan.tile_rows[item], plan.tile_starts[item]
        queries = lax.dynamic_slice_in_dim(padded, start, TILE)
        token = start + jnp.arange(TILE, dtype=jnp.int32)
        end = batch.query_starts[row + 1]
        position = jnp.where(token < end, batch.context_lens[row] - end + token, -1)
        result = run(queries[None], position[None], batch.page_table[row][None], block=TILE_BLOCK)[0]
        # Tiles come in token order, so what this one writes past its row's end the next one overwrites.
        return lax.dynamic_update_slice_in_dim(output, result, start, 0)

    return lax.fori_loop(0, plan.num_tiles, one_tile, output)[: q.shape[0]].astype(q.dtype)


def _attend_rows(q, position, page_table, *, kv, page_offset, window, soft_cap, sinks, block):
    """Attention of q [N, Q, H, D] (scaled, float32), each query at position [N, Q] of its own row; -1 sees nothing.

    A loop over blocks of `block` KV tokens with an online softmax. It runs as far as the longest live context.
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    _, page_size, _, num_kv_heads, _ = kv.shape
    pages_per_block = max(1, min(block // page_size, page_table.shape[1]))
    block = pages_per_block * page_size
    groups = num_heads // num_kv_heads
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages_per_block)))
    q = q.reshape(num_rows, num_queries, num_kv_heads, groups, head_dim)

    def step(index, carry):
        top, total, acc = carry
        ids = lax.dynamic_slice_in_dim(table, index * pages_per_block, pages_per_block, 1) + page_offset
        pages = kv[ids].reshape(num_rows, block, 2, num_kv_heads, head_dim).astype(jnp.float32)
        logits = jnp.einsum("nqkgd,nskd->nkgqs", q, pages[:, :, 0])
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        distance = position[:, :, None] - (index * block + jnp.arange(block, dtype=jnp.int32))
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        logits = jnp.where(visible[:, None, None], logits, NEGATIVE)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        weights = jnp.where(visible[:, None, None], jnp.exp(logits - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=-1)
        acc = acc * shrink[..., None] + jnp.einsum("nkgqs,nskd->nkgqd", weights, pages[:, :, 1])
        return new_top, total, acc

    shape = (num_rows, num_kv_heads, groups, num_queries)
    top = jnp.full(shape, NEGATIVE, jnp.float32)
    total = jnp.zeros(shape, jnp.float32)
    if sinks is not None:
        top = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, num_kv_heads, groups, 1), shape)
        total = jnp.ones(shape, jnp.float32)
    first = 0
    if window is not None:
        lowest = jnp.min(jnp.where(position >= 0, position, jnp.iinfo(jnp.int32).max))
        first = jnp.maximum(lowest - window + 1, 0) // block
    stop = jnp.max(position) // block + 1
    init = (top, total, jnp.zeros((*shape, head_dim), jnp.float32))
    _, total, acc = lax.fori_loop(first, stop, step, init)
    output = acc / jnp.where(total == 0.0, 1.0, total)[..., None]
    return jnp.moveaxis(output, 3, 1).reshape(num_rows, num_queries, num_heads, head_dim)
