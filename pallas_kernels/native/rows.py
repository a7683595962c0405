"""What a decode step does to a few rows: products with whole weight matrices, and norms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

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
    _check_float32(weight=weight, x=x)
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call("pallas_kernels_matmul", out)(weight, x)


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, offset: float = 0.0) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), float32: x [M, E], weight [E]. One operation where XLA makes three.

    CPU only, after `load()` returned None. Not differentiable.

    Raises:
      ValueError: a shape or dtype is outside of this.
    """
    if weight.ndim != 1 or x.ndim != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"x has shape {x.shape} and weight {weight.shape}: they must be [M, E] and [E]")
    _check_float32(x=x, weight=weight)
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    call = jax.ffi.ffi_call("pallas_kernels_rms_norm", out)
    return call(x, weight, eps=np.float32(eps), offset=np.float32(offset))


def _check_float32(**arrays: jax.Array) -> None:
    for name, value in arrays.items():
        if value.dtype != jnp.float32:
            raise ValueError(f"{name} has dtype {value.dtype}: it must be float32")
