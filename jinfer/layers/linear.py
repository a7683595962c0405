"""The one place where a product with weights happens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jinfer.layers.parameter import Build, parameter
from pallas_kernels.native import matmul


def project(
    weight: Float[Array, "*out *in"],
    x: Float[Array, "T *in"],
    *,
    num_in: int = 1,
    weight_first: bool = False,
    native_rows: int = 0,
    accumulate: jax.typing.DTypeLike | None = None,
) -> Float[Array, "T *out"]:
    """`einsum('o...i...,ti...->to...', weight, x)`; the last `num_in` dimensions of weight and x are summed over.

    Weights keep the checkpoint's order, outputs before inputs, so loading moves nothing.

    weight_first: form the product as [out, T] and transpose it (see `Build.weight_first`).
    native_rows: up to so many tokens go to the native CPU kernel (see `Build.native_rows`).
    accumulate: dtype of the result, if not x's.
    """
    out_shape, in_shape = weight.shape[:-num_in], weight.shape[-num_in:]
    in_size, num_tokens = math.prod(in_shape), x.shape[0]
    dtype = accumulate or x.dtype
    if num_tokens <= native_rows:
        return matmul(weight.reshape(-1, in_size), x.reshape(num_tokens, in_size)).reshape(
            num_tokens, *out_shape
        )
    if weight_first:
        # Flat operands: this is the form that XLA's CPU backend hands to its matmul library as it is.
        flat = lax.dot_general(
            weight.reshape(-1, in_size),
            x.reshape(num_tokens, in_size),
            (((1,), (1,)), ((), ())),
            preferred_element_type=dtype,
        )
        return flat.T.reshape(num_tokens, *out_shape)
    w_axes = tuple(range(len(out_shape), weight.ndim))
    x_axes = tuple(range(x.ndim - num_in, x.ndim))
    return lax.dot_general(x, weight, ((x_axes, w_axes), ((), ())), preferred_element_type=dtype)


class Linear(nnx.Module):
    """y = W x + b. `shape_out` and `shape_in` may have several dimensions, so that heads stay an axis of their own.

    weight [*shape_out, *shape_in]; bias [*shape_out] or None.
    """

    def __init__(
        self,
        build: Build,
        shape_out: Sequence[int],
        shape_in: Sequence[int],
        axes_out: Sequence[str | None],
        axes_in: Sequence[str | None],
        *,
        bias: bool = False,
    ) -> None:
        self.weight = parameter(build, (*shape_out, *shape_in), (*axes_out, *axes_in))
        self.bias = parameter(build, shape_out, axes_out) if bias else None
        self.num_in = len(shape_in)
        self.weight_first, self.native_rows = build.weight_first, build.native_rows

    def __call__(self, x: Float[Array, "T *in"]) -> Float[Array, "T *out"]:
        y = project(
            self.weight[...],
            x,
            num_in=self.num_in,
            weight_first=self.weight_first,
            native_rows=self.native_rows,
        )
        return y if self.bias is None else y + self.bias[...]


def embed(
    table: Float[Array, "V E"], tokens: Int[Array, "T"], *, by_product: bool = False
) -> Float[Array, "T E"]:
    """Rows of the table; token ids are in range by the caller's check, so nothing is clamped or filled.

    by_product: multiply with rows of one 1 each, which reads the table once as it lies. Where a TPU keeps the table's
      columns together, picking rows would copy all of it first. The result is the same: all other terms are 0.
    """
    if not by_product:
        return jnp.take(table, tokens, axis=0, mode="clip")
    ones = jax.nn.one_hot(tokens, table.shape[0], dtype=table.dtype)
    # Without it a TPU would round float32 numbers to bfloat16.
    return jnp.matmul(ones, table, precision=lax.Precision.HIGHEST)
