"""Attention in plain XLA, a tile of queries against a block of keys at a time: memory grows with T, not with T * T.

Tiles of queries are taken one after the other; each loops over the blocks of keys that it can see, up to the longest
live sequence, with an online softmax in float32.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import current_platform
from pallas_kernels.flash_attention.spec import AttentionSpec

__all__ = ["attend", "why_not"]

NEGATIVE = -1e30  # stands for minus infinity where a difference of two of them must stay finite
TILE, BLOCK = 256, 512  # measured on CPU: the logits of one KV head stay in the second-level cache


def why_not(spec: AttentionSpec) -> str | None:
    return None


def attend(q, k, v, lengths, sinks, spec: AttentionSpec):
    # XLA's bf16 products on CPU are many times slower than float32 ones, casts included.
    dtype = jnp.float32 if current_platform() == "cpu" else q.dtype
    tile, block = min(TILE, spec.length), min(BLOCK, spec.length)
    padded = -(-spec.length // tile) * tile
    heads = (spec.num_kv_heads, spec.groups)
    # [B, K, G, T, D] and [B, K, T, D]: what batched products read.
    query = jnp.pad(q, ((0, 0), (0, padded - spec.length), (0, 0), (0, 0)))
    query = query.reshape(spec.batch, padded, *heads, spec.head_dim).transpose(0, 2, 3, 1, 4)
    key, value = (_padded_keys(x, block) for x in (k, v))
    if spec.has_sinks:
        sinks = sinks.astype(jnp.float32).reshape(1, *heads, 1)
    longest = jnp.max(lengths)

    def one_tile(index, output):
        start = index * tile
        result = _attend_tile(
            lax.dynamic_slice_in_dim(query, start, tile, axis=3).astype(dtype),
            start,
            longest,
            keys=key,
            values=value,
            lengths=lengths,
            sinks=sinks,
            spec=spec,
            block=block,
        )
        return lax.dynamic_update_slice_in_dim(output, result.astype(output.dtype), start, axis=3)

    # Tiles past the longest sequence are never looked at.
    tiles = jnp.minimum((longest + tile - 1) // tile, padded // tile)
    output = lax.fori_loop(0, tiles, one_tile, jnp.zeros_like(query))
    output = output.transpose(0, 3, 1, 2, 4).reshape(spec.batch, padded, spec.num_heads, spec.head_dim)
    return output[:, : spec.length]


def _padded_keys(x, block: int):
    length = x.shape[1]
    return jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def _attend_tile(query, start, longest, *, keys, values, lengths, sinks, spec: AttentionSpec, block: int):
    """Returns float32 [B, K, G, tile, D]; 0 for tokens past their sequence."""
    tile = query.shape[3]
    position = start + jnp.arange(tile, dtype=jnp.int32)
    live = position[None] < lengths[:, None]
    product = partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)

    def step(index, carry):
        top, total, acc = carry
        first = index * block
        key, value = (
            lax.dynamic_slice_in_dim(x, first, block, axis=2).astype(query.dtype) for x in (keys, values)
        )
        logits = product("bkgtd,bksd->bkgts", query, key) * spec.scale
        if spec.soft_cap is not None:
            logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
        key_position = first + jnp.arange(block, dtype=jnp.int32)
        distance = position[:, None] - key_position
        visible = (key_position < lengths[:, None])[:, None, :]  # [B, 1 or T, S]
        if spec.causal:
            visible &= distance >= 0
        if spec.window is not None:
            visible &= jnp.abs(distance) < spec.window
        visible = visible[:, None, None]
        new_top = jnp.maximum(top, jnp.max(jnp.where(visible, logits, NEGATIVE), axis=-1))
        weights = jnp.where(visible, jnp.exp(logits - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=-1)
        # Whatever stands in dead keys' values, NaN too, must not pass through a weight of 0.
        value = jnp.where((key_position < lengths[:, None])[:, None, :, None], value, 0)
        update = product("bkgts,bksd->bkgtd", weights.astype(query.dtype), value)
        return new_top, total, acc * shrink[..., None] + update

    shape = query.shape[:4]
    top, total = jnp.full(shape, NEGATIVE, jnp.float32), jnp.zeros(shape, jnp.float32)
    if spec.has_sinks:
        top, total = jnp.broadcast_to(sinks, shape), jnp.ones(shape, jnp.float32)
    low, high = 0, longest - 1
    if spec.causal:
        high = jnp.minimum(high, start + tile - 1)
    if spec.window is not None:
        low = jnp.maximum(start - spec.window + 1, 0)
        if not spec.causal:
            high = jnp.minimum(high, start + tile + spec.window - 2)
    acc = jnp.zeros((*shape, spec.head_dim), jnp.float32)
    _, total, acc = lax.fori_loop(low // block, high // block + 1, step, (top, total, acc))
    output = acc / jnp.where(total == 0.0, 1.0, total)[..., None]
    return jnp.where(live[:, None, None, :, None], output, 0.0)
