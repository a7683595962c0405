"""The grouped matmul as a Pallas TPU kernel, after MegaBlocks (arXiv 2211.15841): a work list of (group, tile of rows).

The grid runs over blocks of outputs and, inside, over the work list, whose length is a run-time value: groups without
rows are never fetched. Neighbours in the list share their tile of rows or their group's weight, and Pallas fetches a
block again only when its index changes; so each weight is read from memory once, however many tiles its rows take, and
few rows per group cost what reading the weights costs. A tile that two groups share is visited once by each, and each
stores its own rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_layout import LANES, last_in_lanes

MIN_TILE, MAX_TILE = 16, 256
# Bytes of one block of weights and of one tile of rows; each is held twice, and the products once in float32.
WEIGHT_BYTES = 8 * 1024**2
ROWS_BYTES = 8 * 1024**2
VMEM_BYTES = 64 * 1024**2


def why_not(problem) -> str | None:
    if problem.dtype == jnp.float16:
        return "TPUs do not compute float16"
    if problem.num_in % MIN_TILE or problem.num_out % MIN_TILE:
        return f"sizes {problem.num_out} and {problem.num_in} are not both multiples of {MIN_TILE}"
    if problem.num_in * problem.dtype.itemsize * LANES > WEIGHT_BYTES:
        return f"an input of {problem.num_in} numbers is too long for a block of weights"
    return None


def tile_rows(num_rows: int, num_groups: int, row_bytes: int) -> int:
    """Rows per tile: about two tiles to an average group, so that most products are of one group's rows."""
    average = max(1, num_rows // num_groups)
    wanted = max(LANES, 1 << (average // 2).bit_length())
    most = min(MAX_TILE, 1 << (ROWS_BYTES // row_bytes).bit_length() - 1)
    return min(wanted, most, -(-num_rows // MIN_TILE) * MIN_TILE)


def block_out(num_out: int, row_bytes: int) -> int:
    """Outputs per block: all, or a multiple of 128 within the limit of bytes; the last block may be partly filled."""
    most = WEIGHT_BYTES // row_bytes // LANES * LANES
    each = pl.cdiv(num_out, pl.cdiv(num_out, most))
    return min(num_out, pl.cdiv(each, LANES) * LANES)


def work_list(
    group_sizes: jax.Array, num_rows: int, tile: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(starts int32[G + 1], group and tile of each item, number of items): every pair that shares a row."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = ends - group_sizes
    counts = jnp.where(group_sizes > 0, (ends - 1) // tile - starts // tile + 1, 0)
    item_ends = jnp.cumsum(counts, dtype=jnp.int32)
    num_groups = group_sizes.shape[0]
    # Each group beyond the first can share one tile with the group before it.
    item = jnp.arange(-(-num_rows // tile) + num_groups - 1, dtype=jnp.int32)
    group = jnp.sum(item_ends[None] <= item[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    at = starts[group] // tile + item - (item_ends - counts)[group]
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    return offsets, group, at, item_ends[-1]


def _kernel(offsets, groups, tiles, layer, x, w, out, *, contract: int):
    item = pl.program_id(1)
    group = groups[item]
    dimensions = (((1,), (contract,)), ((), ()))
    product = lax.dot_general(x[...], w[...], dimensions, preferred_element_type=jnp.float32)
    row = tiles[item] * out.shape[0] + lax.broadcasted_iota(jnp.int32, product.shape, 0)
    mine = (row >= offsets[group]) & (row < offsets[group + 1])
    # What the tile holds of other groups stays; what no group owns stays as it was found.
    out[...] = jnp.where(mine, product, out[...].astype(jnp.float32)).astype(out.dtype)


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, layer: jax.Array) -> jax.Array:
    (num_rows, num_in), (_, num_groups, num_out, _) = x.shape, w.shape
    row_bytes = num_in * x.dtype.itemsize
    tile, block = tile_rows(num_rows, num_groups, row_bytes), block_out(num_out, row_bytes)
    *lists, count = work_list(group_sizes, num_rows, tile)
    in_lanes = last_in_lanes(num_out, num_in, x.dtype.itemsize)
    if in_lanes:
        weight = pl.BlockSpec(
            (None, None, block, num_in), lambda n, i, _, groups, tiles, layer: (layer[0], groups[i], n, 0)
        )
    else:
        w = w.swapaxes(2, 3)
        weight = pl.BlockSpec(
            (None, None, num_in, block), lambda n, i, _, groups, tiles, layer: (layer[0], groups[i], 0, n)
        )
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(pl.cdiv(num_out, block), count),
        in_specs=[pl.BlockSpec((tile, num_in), lambda n, i, _, groups, tiles, layer: (tiles[i], 0)), weight],
        out_specs=pl.BlockSpec((tile, block), lambda n, i, _, groups, tiles, layer: (tiles[i], n)),
    )
    bytes_moved = x.nbytes * pl.cdiv(num_out, block) + (num_rows + num_groups * num_in) * num_out * x.itemsize
    call = pl.pallas_call(
        functools.partial(_kernel, contract=1 if in_lanes else 0),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_out), x.dtype),
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * num_in * num_out, bytes_accessed=bytes_moved, transcendentals=0
        ),
        name="grouped_matmul",
    )
    return call(*lists, layer[None], x, w)
