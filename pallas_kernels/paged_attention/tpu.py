"""Paged attention on TPU (v5e, v5p, v6e, 7x) with Pallas kernels: decode rows and prompt chunks each have their own.

See `tpu_pages` for the pool's layout, `tpu_decode` and `tpu_chunks` for the kernels, `tpu_write` for new tokens.

Pages of int8 are widened as they are read, which hides behind their fetch: on v6e, 1,357 bundles per 1,024 tokens of 8
heads of 128 where the fetch takes 2,240 cycles. v6e has no instruction that widens float8_e4m3fn: the same takes 4,122, so
there fp8 pages save memory and not time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.paged_attention import tpu_blocks, tpu_chunks, tpu_decode, tpu_write
from pallas_kernels.paged_attention.batch import KVSpec, RaggedBatch
from pallas_kernels.paged_attention.tpu_pages import (
    LANES,
    LOG2_E,
    MASKED,
    TpuPool,
    joined,
    lanes_of,
    sublanes,
    value_lane,
    work_dtype,
)

__all__ = ["attend", "kv_partition_spec", "kv_shape", "kv_spec", "prepare", "why_not", "write_kv"]

SHARES_VALUES = NARROW_VALUES = True
MAX_HEAD_DIM = 256
MAX_SHARED_HEAD_DIM = 1024  # of keys that are the values too
TABLE_BYTES = 512 * 1024  # of page ids for one kernel: half of the scalar memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TpuPlan:
    """The batch, and the tiles that are written."""

    batch: RaggedBatch
    writes: tpu_write.Writes


def why_not(spec: KVSpec) -> str | None:
    if spec.dtype == jnp.float16:
        return "TPUs do not compute float16"
    most = MAX_SHARED_HEAD_DIM if spec.shared_values else MAX_HEAD_DIM
    if spec.head_dim > most:
        kind = "shared keys and values" if spec.shared_values else "keys and values that are kept apart"
        return f"head_dim is {spec.head_dim}: of {kind} the TPU kernels take up to {most}"
    if spec.page_size % sublanes(spec.dtype):
        return (
            f"page_size is {spec.page_size}: with pages of {spec.dtype.name} the TPU kernels take multiples of "
            f"{sublanes(spec.dtype)}"
        )
    return None


def kv_shape(spec: KVSpec) -> TpuPool:
    num_slabs, lanes = lanes_of(spec.head_dim, spec.shared_values)
    shape = (spec.num_pages, num_slabs, spec.num_kv_heads, spec.page_size, lanes)
    return TpuPool(jax.ShapeDtypeStruct(shape, spec.dtype), spec.head_dim, spec.shared_values)


def kv_partition_spec(tensor_axis: str | None) -> PartitionSpec:
    return PartitionSpec(None, None, tensor_axis, None, None)


def kv_spec(kv: Any) -> KVSpec | None:
    if not isinstance(kv, TpuPool):
        return None
    num_pages, _, num_kv_heads, page_size, _ = kv.pages.shape
    dtype = jnp.dtype(kv.pages.dtype)
    return KVSpec(num_pages, page_size, num_kv_heads, kv.head_dim, dtype, kv.shared_values)


def prepare(batch: RaggedBatch, num_tokens: int, spec: KVSpec) -> TpuPlan:
    writes = tpu_write.plan_writes(batch, num_tokens, spec.page_size, sublanes(spec.dtype))
    return TpuPlan(batch, writes)


def write_kv(kv: TpuPool, k, v, plan: TpuPlan, *, page_offset) -> TpuPool:
    new = joined(k, v, kv.shared_values)
    tile = sublanes(kv.pages.dtype)
    pages = tpu_write.write(kv.pages, new, plan.writes, page_offset.reshape(1), tile)
    return replace(kv, pages=pages)


def attend(
    q,
    kv: TpuPool,
    plan: TpuPlan,
    *,
    page_offset,
    scale,
    sliding_window,
    soft_cap,
    sinks,
    k_scale,
    v_scale,
    value_dim: int | None = None,
):
    num_tokens, num_heads, head_dim = q.shape
    _, _, num_kv_heads, page_size, lanes = kv.pages.shape
    group = num_heads // num_kv_heads
    shape = tpu_blocks.Shape(
        num_heads,
        num_kv_heads,
        kv.head_dim,
        page_size,
        kv.pages.dtype.name,
        plan.batch.page_table.shape[1],
        kv.shared_values,
    )
    blocks = tpu_blocks.choose(shape, sliding_window)
    factor = jnp.full((num_heads,), scale / soft_cap if soft_cap else scale * LOG2_E, jnp.float32)
    if k_scale is not None:
        factor *= jnp.repeat(k_scale, group)
    queries = q.astype(jnp.float32) * factor[:, None]
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, lanes - head_dim)))
    logits = jnp.full((num_heads,), MASKED, jnp.float32)
    if sinks is not None:
        logits = sinks.astype(jnp.float32) * LOG2_E
    common = {
        "window": sliding_window,
        "cap": soft_cap * LOG2_E if soft_cap else None,
        "row_pages": plan.batch.page_table.shape[1],
        "cores": blocks.cores,
        "vmem_bytes": blocks.vmem_bytes,
        "value_lanes": lanes_of(value_dim or head_dim, kv.shared_values)[1],
    }
    groups = _row_groups(plan.batch)
    decodes = [_decodes(queries, logits, kv, rows, page_offset, blocks, common) for rows in groups]
    out = jnp.concatenate(decodes) if len(decodes) > 1 else decodes[0]
    if not plan.batch.decode_only:
        token = jnp.arange(num_tokens)
        out = jnp.pad(out, ((0, max(num_tokens - out.shape[0], 0)), (0, 0), (0, 0)))[:num_tokens]
        for rows in groups:
            chunks = _chunks(queries, logits, kv, plan.batch, rows, page_offset, blocks, q.dtype, common)
            before = token < jnp.maximum(rows.query_starts[0], plan.batch.num_decode_rows)
            out = jnp.where(before[:, None, None], out, chunks)
    live = jnp.arange(num_tokens) < plan.batch.num_tokens
    start = value_lane(kv.head_dim, kv.shared_values)
    out = jnp.where(live[:, None, None], out[:, :, start : start + (value_dim or head_dim)], 0.0)
    if v_scale is not None:
        out *= jnp.repeat(v_scale, group)[:, None]
    return out.astype(q.dtype)


@dataclass(frozen=True)
class RowGroup:
    """Rows whose page table fits in SMEM: rows [start, start + R'), and of them how many decode and how many live."""

    start: int
    query_starts: jax.Array
    context_lens: jax.Array
    table: jax.Array
    num_decode_rows: jax.Array
    num_rows: jax.Array


def _row_groups(batch: RaggedBatch) -> list[RowGroup]:
    """All rows in one group, unless the table is too large for SMEM: 64 rows of 128k tokens are."""
    rows, row_pages = batch.page_table.shape
    size = max(1, TABLE_BYTES // (4 * row_pages))
    groups = []
    for start in range(0, rows, size):
        end = min(start + size, rows)
        groups.append(
            RowGroup(
                start=start,
                query_starts=batch.query_starts[start : end + 1],
                context_lens=batch.context_lens[start:end],
                table=batch.page_table[start:end].reshape(-1),
                num_decode_rows=jnp.clip(batch.num_decode_rows - start, 0, end - start),
                num_rows=jnp.clip(batch.num_rows - start, 0, end - start),
            )
        )
    return groups


def _decodes(queries, sinks, kv: TpuPool, rows: RowGroup, page_offset, blocks, common) -> jax.Array:
    """float32[R', H, L']: the results of decode rows, anything in the others."""
    num_heads, lanes = queries.shape[1:]
    num_kv_heads, group = kv.pages.shape[2], queries.shape[1] // kv.pages.shape[2]
    padding = -group % 8
    num_rows = rows.context_lens.shape[0]
    # A row's token is the token of its number. There may be fewer tokens than rows; then the last rows are padding.
    queries = queries[rows.start : rows.start + num_rows]
    queries = jnp.pad(queries, ((0, num_rows - queries.shape[0]), (0, 0), (0, 0)))
    queries = queries.reshape(num_rows, num_kv_heads, group, lanes)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padding), (0, 0)))
    sinks = jnp.pad(sinks.reshape(num_kv_heads, group), ((0, 0), (0, padding)), constant_values=MASKED)
    meta = jnp.stack([rows.num_decode_rows, page_offset])
    config = tpu_decode.DecodeConfig(
        block_pages=blocks.decode_pages,
        buffers=blocks.decode_buffers,
        part_pages=blocks.decode_part_pages,
        **common,
    )
    out = tpu_decode.decode(
        queries,
        kv.pages,
        rows.context_lens,
        rows.table,
        meta,
        jnp.broadcast_to(sinks[..., None], (*sinks.shape, LANES)),
        config,
    )
    return out[:, :, :group].reshape(num_rows, num_heads, -1)


def _chunks(
    queries, sinks, kv: TpuPool, batch: RaggedBatch, rows: RowGroup, page_offset, blocks, dtype, common
) -> jax.Array:
    """float32[T, H, L']: the results of rows that are not decode rows, anything in the others."""
    num_tokens, num_heads, lanes = queries.shape
    own_heads, work = num_heads // blocks.cores, work_dtype(kv.pages.dtype)
    by_token = kv.pages.shape[2] in (1, blocks.cores) and own_heads % sublanes(work) == 0
    config = tpu_chunks.ChunkConfig(
        tile=blocks.chunk_tile,
        small_tile=blocks.chunk_small_tile,
        block_pages=blocks.chunk_pages,
        buffers=blocks.chunk_buffers,
        by_token=by_token,
        **common,
    )
    tree = None
    if batch.tree_mask is not None:
        tree = jnp.pad(batch.tree_mask, ((0, config.tile), (0, 0)))
        tree = jnp.broadcast_to(tree[..., None], (*tree.shape, LANES))
    queries = jnp.pad(queries, ((0, config.tile), (0, 0), (0, 0)))
    queries = queries.reshape(num_tokens + config.tile, config.cores, -1, lanes).swapaxes(0, 1)
    if by_token:
        queries, sinks = queries.astype(work), sinks.reshape(config.cores, own_heads, 1)
    else:
        sinks = sinks[:, None, None]
    out = tpu_chunks.attend_chunks(
        queries,
        kv.pages,
        rows.query_starts,
        rows.context_lens,
        rows.table,
        jnp.stack([rows.num_decode_rows, rows.num_rows, page_offset]),
        jnp.broadcast_to(sinks, (*sinks.shape[:2], LANES)),
        tree,
        dtype if by_token else jnp.float32,
        config,
    )
    return out.swapaxes(0, 1).reshape(-1, num_heads, config.value_lanes)[:num_tokens].astype(jnp.float32)
