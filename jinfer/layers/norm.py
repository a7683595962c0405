"""Normalisation, in float32 whatever the activations are."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jinfer.layers.parameter import Build, parameter


class RMSNorm(nnx.Module):
    """w * x / sqrt(mean(x^2) + eps), rounded to x's dtype before the product with w, as in the Llama reference."""

    def __init__(self, build: Build, size: int, eps: float) -> None:
        self.weight = parameter(build, (size,), (None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*t E"]) -> Float[Array, "*t E"]:
        wide = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype) * self.weight[...]
