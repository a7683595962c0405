"""Normalisation, in float32 whatever the activations are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jinfer.layers.parameter import Build, parameter
from pallas_kernels.native import rms_norm


@dataclass(frozen=True)
class NormSpec:
    """Which normalisation, as data.

    kind: "rms" (divides by the root of the mean square) or "layer" (subtracts the mean first, adds a bias at the end).
    offset: added to the weight in the product.
    wide: the product with the weight is in float32 too, and rounded last; else the normalised value is rounded first.
    """

    kind: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    wide: bool = False

    def make(
        self, build: Build, shape: Sequence[int], axes: Sequence[str | None] | None = None
    ) -> RMSNorm | LayerNorm:
        """The module that normalises over the last dimensions, of this shape and these logical axes."""
        names = tuple(axes) if axes is not None else (None,) * len(shape)
        if self.kind == "layer":
            return LayerNorm(build, tuple(shape), names, self.eps)
        return RMSNorm(build, tuple(shape), names, self)


class RMSNorm(nnx.Module):
    """(w + offset) * x / sqrt(mean(x^2) + eps); the mean is over as many last dimensions as the weight has."""

    def __init__(
        self, build: Build, shape: tuple[int, ...], axes: tuple[str | None, ...], spec: NormSpec
    ) -> None:
        self.weight = parameter(build, shape, axes)
        self.spec, self.native_rows = spec, build.native_rows

    def __call__(self, x: Float[Array, "*t *shape"]) -> Float[Array, "*t *shape"]:
        weight: Any = self.weight[...]
        if weight.ndim == 1 and x.ndim == 2 and x.shape[0] <= self.native_rows:
            return rms_norm(x, weight, eps=self.spec.eps, offset=self.spec.offset)
        over = tuple(range(-weight.ndim, 0))
        wide = x.astype(jnp.float32)
        unit = wide * lax.rsqrt(jnp.mean(wide * wide, axis=over, keepdims=True) + self.spec.eps)
        if self.spec.wide:
            return (unit * (weight.astype(jnp.float32) + self.spec.offset)).astype(x.dtype)
        return unit.astype(x.dtype) * (weight + self.spec.offset if self.spec.offset else weight)


class LayerNorm(nnx.Module):
    """w * (x - mean(x)) / sqrt(var(x) + eps) + b, over as many last dimensions as the weight has."""

    def __init__(
        self, build: Build, shape: tuple[int, ...], axes: tuple[str | None, ...], eps: float
    ) -> None:
        self.weight = parameter(build, shape, axes)
        self.bias = parameter(build, shape, axes)
        self.eps = eps

    def __call__(self, x: Float[Array, "*t *shape"]) -> Float[Array, "*t *shape"]:
        weight: Any = self.weight[...]
        over = tuple(range(-weight.ndim, 0))
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=over, keepdims=True)
        unit = centred * lax.rsqrt(jnp.mean(centred * centred, axis=over, keepdims=True) + self.eps)
        return (unit * weight.astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
