"""The grouped matmul as two loops: over the groups that have rows, and over tiles of their rows. The CPU's path.

XLA lowers `ragged_dot` on CPU to a product of every row with every group. Here a group's weight is sliced out once (a
copy, which costs about as much as reading it from memory again) and multiplied by tiles of the group's rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# Rows of one product. More waste arithmetic on rows of the next group, fewer waste what reading the weight costs:
# measured on two cores, 8 rows take as long as 2, and 64 rows one and a half times as long.
MIN_TILE, MAX_TILE = 8, 64


def why_not(problem) -> str | None:
    return None


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Rows per tile: the power of two at or above the average group, within the limits."""
    average = max(1, num_rows // num_groups)
    return min(max(MIN_TILE, 1 << (average - 1).bit_length()), MAX_TILE, max(1, num_rows))


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, layer: jax.Array) -> jax.Array:
    num_rows = x.shape[0]
    tile = tile_rows(num_rows, w.shape[1])
    starts = jnp.cumsum(group_sizes) - group_sizes
    # Groups with rows first, in their own order.
    present = jnp.argsort(group_sizes == 0, stable=True).astype(jnp.int32)
    padded = jnp.pad(x, ((0, tile), (0, 0)))

    def one_group(index, output):
        group = present[index]
        weight = lax.dynamic_slice(w, (layer, group, 0, 0), (1, 1, *w.shape[2:]))[0, 0]

        def one_tile(at, output):
            start = starts[group] + at * tile
            rows = lax.dynamic_slice_in_dim(padded, start, tile)
            # [N, rows], transposed afterwards: the form that XLA's CPU matmul computes fastest at few rows.
            product = lax.dot_general(
                weight, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            # The last tile of a group reaches into the next group's rows. Those are written again, by their own
            # group, which comes later: so the order of the groups matters.
            return lax.dynamic_update_slice_in_dim(output, product.T.astype(output.dtype), start, 0)

        return lax.fori_loop(0, -(-group_sizes[group] // tile), one_tile, output)

    count = jnp.sum(group_sizes > 0, dtype=jnp.int32)
    output = jnp.zeros((num_rows + tile, w.shape[2]), x.dtype)
    return lax.fori_loop(0, count, one_group, output)[:num_rows]
