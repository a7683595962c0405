"""Dense attention as a Pallas TPU (Mosaic) kernel.

Grid: sequence, KV head, and a list of pairs (tile of queries, block of keys) that holds only pairs with something to
see: blocks above the diagonal or before the window are neither fetched nor passed. All query heads of a KV head go
together, so a block of keys is fetched once for all of them. Softmax is online, in float32 and in powers of two.

Heads lie side by side on the lanes, [B, T, H * D], as a projection makes them: with a head size that is a multiple of
128 nothing is transposed or copied on the way in or out; other head sizes are padded with zeros.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.spec import AttentionSpec
from pallas_kernels.flash_attention.tpu_plan import (
    FIRST,
    LAST,
    MASKED,
    Blocks,
    choose_blocks,
    pair_list,
    unpack,
)

__all__ = ["attend", "why_not"]

LANES = 128
NEGATIVE = -1e30  # stands for minus infinity where a difference of two of them must stay finite
LOG2E = math.log2(math.e)
VMEM_BYTES = 48 * 1024 * 1024  # of 64 MiB on v5p and tpu7x, 128 MiB on v5e and v6e
MAX_PAIRS = 1 << 17  # the list lives in the scalar memory: 1 MiB on every generation


def why_not(spec: AttentionSpec) -> str | None:
    if spec.head_dim > 512:
        return f"head_dim is {spec.head_dim}: the kernel takes up to 512"
    if len(pair_list(spec, choose_blocks(spec))) > MAX_PAIRS:
        return f"{spec.length} tokens make more than {MAX_PAIRS} pairs of blocks: the list does not fit"
    return None


def attend(q, k, v, lengths, sinks, spec: AttentionSpec):
    width = -(-spec.head_dim // LANES) * LANES
    blocks = choose_blocks(spec)
    pairs = jnp.asarray(pair_list(spec, blocks))
    q, k, v = (_side_by_side(x, width) for x in (q, k, v))
    if sinks is None:
        sinks = jnp.zeros((spec.num_heads,), jnp.float32)

    def query_at(b, head, pair, pairs, lengths, sinks):
        return b, unpack(pairs[pair])[0], head

    def key_at(b, head, pair, pairs, lengths, sinks):
        # Pairs past the sequence's end stay on its last block: what is already there is not fetched again.
        last = jnp.maximum(lengths[b] - 1, 0) // blocks.keys
        return b, jnp.minimum(unpack(pairs[pair])[1], last), head

    queries = pl.BlockSpec((1, blocks.queries, spec.groups * width), query_at)
    keys = pl.BlockSpec((1, blocks.keys, width), key_at)
    rows = (spec.groups, blocks.queries)
    output = pl.pallas_call(
        partial(_kernel, spec=spec, blocks=blocks, width=width),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(spec.batch, spec.num_kv_heads, pairs.shape[0]),
            in_specs=[queries, keys, keys],
            out_specs=queries,
            scratch_shapes=[
                pltpu.VMEM((*rows, LANES), jnp.float32),
                pltpu.VMEM((*rows, LANES), jnp.float32),
                pltpu.VMEM((*rows, width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        name="flash_attention",
    )(pairs, lengths, sinks.astype(jnp.float32), q, k, v)
    return output.reshape(*output.shape[:2], spec.num_heads, width)[..., : spec.head_dim]


def _side_by_side(x, width: int):
    """[B, T, heads, D] -> [B, T, heads * width]."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3])))
    return x.reshape(*x.shape[:2], -1)


def _kernel(
    pairs_ref,  # int32[pairs] in SMEM
    lengths_ref,  # int32[B]
    sinks_ref,  # float32[H]
    q_ref,  # [1, queries, G * width]
    k_ref,  # [1, keys, width]
    v_ref,
    o_ref,  # like q
    top_ref,  # float32[G, queries, LANES]: running maximum, the same in all lanes
    total_ref,  # float32[G, queries, LANES]: running sum, one part per lane
    acc_ref,  # float32[G, queries, width]
    *,
    spec: AttentionSpec,
    blocks: Blocks,
    width: int,
):
    tile, block, flags = unpack(pairs_ref[pl.program_id(2)])
    length = lengths_ref[pl.program_id(0)]
    first_query, first_key = tile * blocks.queries, block * blocks.keys
    head = pl.program_id(1) * spec.groups
    live = (first_query < length) & (first_key < length)
    masked = ((flags & MASKED) != 0) | (first_key + blocks.keys > length)
    step = partial(
        _step,
        q_ref,
        k_ref,
        v_ref,
        top_ref,
        total_ref,
        acc_ref,
        spec=spec,
        blocks=blocks,
        width=width,
        first_query=first_query,
        first_key=first_key,
        length=length,
    )

    @pl.when((flags & FIRST) != 0)
    def start():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        top_ref[...] = jnp.full_like(top_ref, NEGATIVE)
        total_ref[...] = jnp.zeros_like(total_ref)
        if spec.has_sinks:
            lane = lax.broadcasted_iota(jnp.int32, total_ref.shape[1:], 1)
            for g in range(spec.groups):
                top_ref[g] = jnp.full(top_ref.shape[1:], sinks_ref[head + g] * LOG2E)
                total_ref[g] = jnp.where(lane == 0, 1.0, 0.0)

    @pl.when(live & ~masked)
    def whole():
        step(masked=False)

    @pl.when(live & masked)
    def in_part():
        step(masked=True)

    @pl.when((flags & LAST) != 0)
    def finish():
        for g in range(spec.groups):
            total = jnp.sum(total_ref[g], axis=1, keepdims=True)
            o_ref[0, :, g * width : (g + 1) * width] = (
                acc_ref[g] / jnp.where(total == 0.0, 1.0, total)
            ).astype(o_ref.dtype)


def _step(
    q_ref,
    k_ref,
    v_ref,
    top_ref,
    total_ref,
    acc_ref,
    *,
    spec: AttentionSpec,
    blocks: Blocks,
    width: int,
    first_query,
    first_key,
    length,
    masked: bool,
):
    """One block of keys for all query heads of the tile.

    The tile is taken in units of rows that do not depend on each other. While one's softmax occupies the vector
    units, the next one's logits and the last one's values occupy the matrix units: that overlap is the compiler's to
    find, and it finds it when the program is written in this order.
    """
    k, v = k_ref[0], v_ref[0]
    num_keys = k.shape[0]
    product = partial(
        lax.dot_general,
        precision=lax.Precision.HIGHEST if k.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    visible = None
    if masked:
        visible = _visible(spec, (blocks.queries, num_keys), first_query, first_key, length)
        # Dead keys' values may be NaN, which a weight of 0 would not stop.
        position = first_key + lax.broadcasted_iota(jnp.int32, v.shape, 0)
        v = jnp.where(position < length, v.astype(jnp.float32), 0.0).astype(v.dtype)

    def score(unit):
        head, rows = unit
        q = q_ref[0, rows, head * width : (head + 1) * width]
        logits = product(q, k, (((1,), (1,)), ((), ())))
        if spec.soft_cap is None:
            logits = logits * (spec.scale * LOG2E)
        else:
            logits = jnp.tanh(logits * (spec.scale / spec.soft_cap)) * (spec.soft_cap * LOG2E)
        return logits if visible is None else jnp.where(visible[rows], logits, NEGATIVE)

    def weigh(unit, logits):
        top = top_ref[unit]
        new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp2(logits - _widen(new_top, num_keys))
        shrink = jnp.exp2(top - new_top)
        parts = weights[:, :LANES]
        for lane in range(LANES, num_keys, LANES):
            parts += weights[:, lane : lane + LANES]
        total_ref[unit] = total_ref[unit] * shrink + parts
        top_ref[unit] = new_top
        return weights.astype(v.dtype), shrink

    def gather(unit, weights, shrink):
        acc_ref[unit] = acc_ref[unit] * _widen(shrink, width) + product(weights, v, (((1,), (0,)), ((), ())))

    starts = range(0, blocks.queries, blocks.unit)
    units = [(head, slice(row, row + blocks.unit)) for head in range(spec.groups) for row in starts]
    scored, weighed = [], []
    for index in range(len(units) + 2):
        if index < len(units):
            scored.append(score(units[index]))
        if 0 < index <= len(units):
            weighed.append(weigh(units[index - 1], scored.pop(0)))
        if index > 1:
            gather(units[index - 2], *weighed.pop(0))


def _widen(x, size: int):
    """float32[rows, LANES], the same in all lanes -> [rows, size]."""
    return jnp.concatenate([x] * (size // LANES), axis=1) if size > LANES else x


def _visible(spec: AttentionSpec, shape: tuple[int, int], first_query, first_key, length):
    """bool[queries, keys]."""
    query = first_query + lax.broadcasted_iota(jnp.int32, shape, 0)
    key = first_key + lax.broadcasted_iota(jnp.int32, shape, 1)
    visible = key < length
    if spec.causal:
        visible &= key <= query
    if spec.window is not None:
        visible &= query - key < spec.window
        if not spec.causal:
            visible &= key - query < spec.window
    return visible
