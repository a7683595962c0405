"""A few rows times a whole weight matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Above this XLA's own product, which repacks both sides, is as fast or faster.
MAX_ROWS = 96


def matmul(weight: jax.Array, x: jax.Array) -> jax.Array:
    """x @ weight.T, float32: weight [N, K], x [M, K] -> [M, N]. CPU only, after `load()` returned None.

    The weight is read once, so for few rows the speed is the memory's. A row's result does not depend on which rows
    stand beside it. Not differentiable.

    Raises:
      ValueError: a shape or dtype is outside of this.
    """
    if weight.ndim != 2 or x.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight has shape {weight.shape} and x {x.shape}: they must be [N, K] and [M, K]")
    for name, value in (("weight", weight), ("x", x)):
        if value.dtype != jnp.float32:
            raise ValueError(f"{name} has dtype {value.dtype}: it must be float32")
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call("pallas_kernels_matmul", out)(weight, x)
