"""The grouped matmul written to be read: every row with every group's weight, and the row's own picked out."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def why_not(problem) -> str | None:
    return None


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, layer: jax.Array) -> jax.Array:
    w, row = w[layer], jnp.arange(x.shape[0])
    group = jnp.sum(jnp.cumsum(group_sizes)[None] <= row[:, None], axis=1)
    every = jnp.einsum("mk,gnk->mgn", x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")
    # Rows past the last group have no weight: one_hot gives them zeros.
    own = jax.nn.one_hot(group, w.shape[0], dtype=jnp.float32)
    return jnp.einsum("mgn,mg->mn", every, own, precision="highest").astype(x.dtype)
