"""The grouped matmul as XLA's own operation: `jax.lax.ragged_dot_general`, the path of accelerators without a kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def why_not(problem) -> str | None:
    return None


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, layer: jax.Array) -> jax.Array:
    w = lax.dynamic_index_in_dim(w, layer, keepdims=False)
    y = lax.ragged_dot_general(x, w, group_sizes, _DIMENSIONS, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
