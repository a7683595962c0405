"""Dense attention on NVIDIA's Hopper GPUs (H100, H200), in Mosaic GPU: the tile kernel of `gpu_tiles` over whole arrays.

Tiles of up to 128 rows of packed query heads, one warpgroup that fetches by TMA and two that multiply by wgmma in
turns, the longest tiles first; blocks that no query sees are never fetched, tiles past a sequence's length do not run.
bf16 of head sizes 64 to 256; what else the contract allows takes the XLA path, and so do other GPUs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention.spec import AttentionSpec
from pallas_kernels.gpu_parts import why_not_here
from pallas_kernels.gpu_tiles import CONSUMERS, Tile, TileShape, run_tiles, tile_config

__all__ = ["attend", "why_not"]

HEAD_DIMS = (64, 80, 96, 112, 128, 256)
MOST_HEADS = 64  # query heads per KV head that fit the rows of one tile


def why_not(spec: AttentionSpec) -> str | None:
    if spec.dtype != jnp.bfloat16:
        return f"its kernel reads bfloat16, and these arrays are {spec.dtype}"
    if spec.head_dim not in HEAD_DIMS:
        return f"its kernel serves head sizes {list(HEAD_DIMS)}, and this one is {spec.head_dim}"
    if spec.groups > MOST_HEADS:
        return f"its kernel serves at most {MOST_HEADS} query heads per KV head, and here are {spec.groups}"
    return why_not_here()


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    sinks: jax.Array | None,
    spec: AttentionSpec,
) -> jax.Array:
    config = tile_config(spec.head_dim)
    shape = TileShape(
        groups=spec.num_kv_heads,
        heads=spec.groups,
        head_dim=spec.head_dim,
        copies=1,
        causal=spec.causal,
        window=spec.window,
        soft_cap=spec.soft_cap,
        has_sinks=spec.has_sinks,
        tree_words=0,
        config=config,
    )
    size = config.kv_tokens
    behind = -spec.length % size
    k, v = (jnp.pad(x, ((0, 0), (0, behind), (0, 0), (0, 0))) for x in (k, v))
    tiles, num_tiles = _tiles(lengths, spec, CONSUMERS * shape.tokens)

    def fetch(row, block, group, half, copies, *keys_values):
        return [keys_values[half].at[row, pl.ds(block * size, size), group] for _ in copies]

    output = run_tiles(
        q.reshape(-1, *q.shape[2:]),
        tiles,
        num_tiles,
        jnp.full((spec.num_kv_heads,), spec.scale, jnp.float32),
        sinks,
        None,
        (k, v),
        fetch,
        shape,
        "flash_attention",
    ).reshape(q.shape)
    live = jnp.arange(spec.length) < lengths[:, None]
    return jnp.where(live[:, :, None, None], output, 0)


def _tiles(lengths: jax.Array, spec: AttentionSpec, tile_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Every tile of every sequence, those past a sequence's length last; and how many are not."""
    position = jnp.arange(0, spec.length, tile_tokens, dtype=jnp.int32)
    row = jnp.repeat(jnp.arange(spec.batch, dtype=jnp.int32), position.shape[0])
    position = jnp.tile(position, spec.batch)
    length = lengths[row]
    count = jnp.clip(length - position, 0, tile_tokens)
    end = position + count
    high, low = length, jnp.zeros_like(length)
    if spec.window is not None:
        low = jnp.maximum(position - spec.window + 1, 0)
        high = jnp.minimum(length, end + spec.window - 1)
    if spec.causal:
        high = end
    live = count > 0
    low, high = jnp.where(live, low, 0), jnp.where(live, high, -1)
    tiles = Tile(row, row * spec.length + position, count, position, low, high, jnp.zeros_like(row))
    return tiles.pack(), jnp.sum(live, dtype=jnp.int32)
