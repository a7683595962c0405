"""Paged attention on NVIDIA's Hopper GPUs (H100, H200), in Mosaic GPU.

KV layout: [P, 2, K, S, D], the XLA path's: one page of one head is a matrix in one piece, which is what TMA fetches.

* Decode rows (`gpu_decode`): contexts are cut into pieces that keep every streaming multiprocessor busy; a page's
  keys and values arrive by TMA several blocks ahead; the query heads of a KV head fill the rows of one wgmma tile; a
  second kernel joins the pieces.
* Prompt chunks and verification rows (`gpu_tiles`): tiles of up to 128 rows of packed query heads, one warpgroup that
  fetches and two that multiply in turns.
* Both walk lists of live work (`gpu_plan`), so padded rows, tokens and contexts cost nothing.

bf16 pools of head sizes 64 to 256; other pools and other GPUs take the XLA path, which shares this layout.
What is checked without the device: GPU interpret mode with race detection runs these kernels whole, with the stand-ins
that `gpu_parts` names; compiling for an H100 and an H200 shows that they fit, without spills. Not checked without the
device: register layouts beyond compiling, races of copies from shared to global memory, and speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_parts import why_not_here
from pallas_kernels.gpu_tiles import CONSUMERS, TileShape, run_tiles
from pallas_kernels.paged_attention.batch import KVSpec, RaggedBatch
from pallas_kernels.paged_attention.gpu_config import decode_config, prompt_config
from pallas_kernels.paged_attention.gpu_decode import DecodeShape, attend_decode
from pallas_kernels.paged_attention.gpu_plan import (
    Pieces,
    copies_of,
    cut_decodes,
    cut_prompts,
    places_of,
    whole_blocks,
)
from pallas_kernels.paged_attention.xla import kv_partition_spec, kv_shape, kv_spec

__all__ = ["attend", "kv_partition_spec", "kv_shape", "kv_spec", "prepare", "why_not", "write_kv"]

HEAD_DIMS = (64, 80, 96, 112, 128, 256)
PAGE_SIZES = (8, 16, 32, 64, 128)
MOST_HEADS = 64  # query heads that fit the rows of one tile


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """What every layer of a step needs and no layer changes.

    Attributes:
      pieces: of decode rows, for layers without a window.
      pages, slots: int32[T]. Where each token's KV is kept; padded tokens have a page past the pool.
    """

    batch: RaggedBatch
    pieces: Pieces
    pages: jax.Array
    slots: jax.Array


def why_not(spec: KVSpec) -> str | None:
    if spec.dtype != jnp.bfloat16:
        return f"its kernels read bfloat16 pools, and this one is {spec.dtype}"
    if spec.head_dim not in HEAD_DIMS:
        return f"its kernels serve head sizes {list(HEAD_DIMS)}, and this pool's is {spec.head_dim}"
    if spec.page_size not in PAGE_SIZES:
        return f"its kernels serve page sizes {list(PAGE_SIZES)}, and this pool's is {spec.page_size}"
    return why_not_here()


def prepare(batch: RaggedBatch, num_tokens: int, spec: KVSpec) -> Plan:
    pages, slots = batch.token_slots(num_tokens, spec.page_size)
    return Plan(batch, _pieces(batch, spec, None), pages, slots)


def _pieces(batch: RaggedBatch, spec: KVSpec, window: int | None) -> Pieces:
    config = decode_config(spec.page_size, spec.head_dim)
    return cut_decodes(batch, spec.page_size, spec.num_kv_heads, config.kv_tokens, config.num_blocks, window)


def write_kv(kv: jax.Array, k: jax.Array, v: jax.Array, plan: Plan, *, page_offset) -> jax.Array:
    """XLA's scatter: in place when the pool is donated, one pass over the new tokens. Padded tokens are dropped."""
    live = jnp.arange(k.shape[0]) < plan.batch.num_tokens
    pages = jnp.where(live, plan.pages + page_offset, kv.shape[0])
    new = jnp.stack([k, v], axis=1).astype(kv.dtype)
    return kv.at[pages, :, :, plan.slots].set(new, mode="drop")


def attend(
    q: jax.Array,
    kv: jax.Array,
    plan: Plan,
    *,
    page_offset,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
    k_scale: Any,
    v_scale: Any,
) -> jax.Array:
    spec = kv_spec(kv)
    assert spec is not None
    num_tokens, num_heads, head_dim = q.shape
    tiles, heads = _split(num_heads // spec.num_kv_heads)
    packed = _pad_heads(q.astype(kv.dtype), spec.num_kv_heads, tiles * heads, axis=1)
    if sinks is not None:
        sinks = _pad_heads(sinks.astype(jnp.float32), spec.num_kv_heads, tiles * heads, axis=0)
    num_rows = min(plan.batch.max_rows, num_tokens)
    pieces = plan.pieces if sliding_window is None else _pieces(plan.batch, spec, sliding_window)
    shape = DecodeShape(
        kv_heads=spec.num_kv_heads,
        tiles=tiles,
        heads=heads,
        head_dim=head_dim,
        page_size=spec.page_size,
        soft_cap=soft_cap,
        config=decode_config(spec.page_size, head_dim),
    )
    qk_scale = jnp.full((spec.num_kv_heads,), scale, jnp.float32)
    output = attend_decode(packed[:num_rows], kv, pieces, page_offset, qk_scale, sinks, shape)
    if not plan.batch.decode_only:
        prompts = _attend_prompts(packed, kv, plan.batch, page_offset, qk_scale, sinks, shape, sliding_window)
        output = jnp.pad(output, ((0, num_tokens - num_rows), (0, 0), (0, 0)))
        token = jnp.arange(num_tokens)[:, None, None]
        prompts = jnp.where(token < plan.batch.num_tokens, prompts, 0)
        output = jnp.where(token < plan.batch.num_decode_rows, output, prompts)
    output = output.reshape(num_tokens, spec.num_kv_heads, tiles * heads, head_dim)
    return output[:, :, : num_heads // spec.num_kv_heads].reshape(q.shape).astype(q.dtype)


def _attend_prompts(q, kv, batch: RaggedBatch, page_offset, qk_scale, sinks, decode: DecodeShape, window):
    config = prompt_config(decode.page_size, decode.head_dim)
    copies, _ = copies_of(decode.page_size, config.kv_tokens)
    shape = TileShape(
        groups=decode.kv_heads * decode.tiles,
        heads=decode.heads,
        head_dim=decode.head_dim,
        copies=copies,
        causal=True,
        window=window,
        soft_cap=decode.soft_cap,
        has_sinks=sinks is not None,
        tree_words=0 if batch.tree_mask is None else batch.tree_mask.shape[1],
        config=config,
    )
    tiles, num_tiles = cut_prompts(batch, q.shape[0], CONSUMERS * shape.tokens, window)
    table = whole_blocks(batch.page_table, decode.page_size, config.kv_tokens)

    def fetch(row, block, group, half, some, pool, table, offset):
        head = group if decode.tiles == 1 else jax.lax.div(group, jnp.int32(decode.tiles))
        return [
            pool.at[(2 * (page + offset[0]) + half) * decode.kv_heads + head, slot]
            for page, slot in places_of(table, row, block, some, decode.page_size, config.kv_tokens)
        ]

    pool = kv.reshape(-1, decode.page_size, decode.head_dim)
    offset = jnp.asarray(page_offset, jnp.int32).reshape(1)
    return run_tiles(
        q,
        tiles,
        num_tiles,
        jnp.repeat(qk_scale, decode.tiles),
        sinks,
        batch.tree_mask,
        (pool, table, offset),
        fetch,
        shape,
        "paged_attention_prompts",
    )


def _split(groups: int) -> tuple[int, int]:
    """Query heads of one KV head, parted over tiles: (tiles, heads in each)."""
    tiles = -(-groups // MOST_HEADS)
    return tiles, -(-groups // tiles)


def _pad_heads(x: jax.Array, kv_heads: int, heads: int, axis: int) -> jax.Array:
    """Gives every KV head the same number of query heads, with zeros behind its own."""
    groups = x.shape[axis] // kv_heads
    if groups == heads:
        return x
    shape = (*x.shape[:axis], kv_heads, groups, *x.shape[axis + 1 :])
    widths = [(0, 0)] * len(shape)
    widths[axis + 1] = (0, heads - groups)
    padded = jnp.pad(x.reshape(shape), widths)
    return padded.reshape(*x.shape[:axis], kv_heads * heads, *x.shape[axis + 1 :])
