"""Parameters are declared, not initialised: a shape, a dtype and logical axes. Loading fills them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class Build:
    """How a model is built.

    dtype: of weights and activations.
    weight_first: compute w @ x.T instead of x @ w.T. XLA's CPU matmul runs up to twice as fast this way at few rows.
    native_rows: up to so many tokens are multiplied and normalised by `pallas_kernels.native`, which XLA can neither
      partition nor differentiate: float32 steps on one CPU device only.
    tensor_parallel: devices that share each layer; KV heads are replicated up to it.
    expert_parallel: sets of such devices that part the experts of a mixture among them.
    experts_over_tensor: the devices that share a layer hold whole experts, instead of a part of each.
    platform: "cpu", "gpu" or "tpu", where the model runs; None: where jax runs by default.
    stack: None, or the number of layers that every parameter holds in a leading dimension, for `lax.scan`.
    """

    dtype: Any = jnp.float32
    weight_first: bool = True
    native_rows: int = 0
    tensor_parallel: int = 1
    expert_parallel: int = 1
    experts_over_tensor: bool = False
    platform: str | None = None
    stack: int | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InStack:
    """One layer's parameter as a place in the stack of all layers: array [L, ...], index int32[]."""

    array: jax.Array
    index: jax.Array


def parameter(
    build: Build,
    shape: Sequence[int],
    axes: Sequence[str | None],
    dtype: Any = None,
    *,
    in_place: bool = False,
) -> nnx.Param:
    """An abstract parameter; `axes` names one logical axis (or None) per dimension, see `jinfer.mesh.RULES`.

    in_place: in a scan over layers the parameter's value is an `InStack`, not the layer's slice of the stack. A kernel
    can read that in place; for a kernel XLA would copy the slice first, every step.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} and axes {tuple(axes)} differ in length")
    full, names = tuple(shape), tuple(axes)
    if build.stack is not None:
        full, names = (build.stack, *full), ("layers", *names)
    return nnx.Param(jax.ShapeDtypeStruct(full, dtype or build.dtype), logical_axes=names, in_place=in_place)
