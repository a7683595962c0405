"""The contract of the grouped matmul.

    rows      a0 a1 b0 b1 b2 d0 -- --      sorted by group, padding last
    sizes     2  3  0  1                   one per group; they need not add up to the number of rows

Row i of group g gives w[g] @ x[i]. Weights keep a checkpoint's order, outputs before inputs, as in `Linear`. The number
of rows is static and the sizes are not, so one program serves every way that rows fall to groups; no row is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import AUTO, Registry
from pallas_kernels.grouped_matmul import loop, reference, tpu, xla

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Problem:
    """The static side of one call: M rows of K numbers, G weights of [N, K]."""

    num_rows: int
    num_groups: int
    num_out: int
    num_in: int
    dtype: jnp.dtype


class Implementation(Protocol):
    """The rooms an implementation's module has."""

    why_not: Callable[[Problem], str | None]
    # (x [M, K], w [L, G, N, K], group sizes int32[G], layer int32[]) -> [M, N]
    grouped_matmul: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


# On CPU `ragged_dot` lowers to a dense product with masks: measured 30 to 60 times slower than the loop at 32 groups.
REGISTRY: Registry[Implementation] = Registry(
    "grouped_matmul", platform_order={"tpu": ("tpu", "xla"), "gpu": ("xla",), "*": ("loop",)}
)
REGISTRY.add("reference", cast(Implementation, reference))
REGISTRY.add("xla", cast(Implementation, xla))
REGISTRY.add("loop", cast(Implementation, loop))
REGISTRY.add("tpu", cast(Implementation, tpu))


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    layer: int | jax.Array | None = None,
    implementation: str = AUTO,
    platform: str | None = None,
) -> jax.Array:
    """y[i] = w[g] @ x[i] for every row i of group g, summed in float32.

    Group g owns the rows [sum(group_sizes[:g]), sum(group_sizes[:g + 1])). Empty groups cost nothing.

    Args:
      x: [M, K], float32, bfloat16 or float16.
      w: [G, N, K], in x's dtype.
      group_sizes: int32[G], none negative, with a sum of at most M.
      layer: if given, w is [L, G, N, K], the weights of a stack of layers, and this is the index of the one to use. A
        kernel reads it in place, where a slice of the stack would be copied first.
      platform: where it will run ("cpu", "gpu" or "tpu"), if not where jax places it by itself.

    Returns:
      [M, N] in x's dtype. Rows that no group owns may hold anything, NaN too: mask them before summing.

    Differentiable in x and w; the gradients are XLA's own.

    Raises:
      ValueError: an argument is outside the contract.
      ImplementationError: the named implementation cannot serve it.
    """
    names = "[G, N, K]" if layer is None else "[L, G, N, K]"
    if x.ndim != 2 or w.ndim != names.count(",") + 1 or w.shape[-1] != x.shape[1]:
        raise ValueError(f"x has shape {x.shape} and w {w.shape}: they must be [M, K] and {names}")
    if layer is None:
        w, layer = w[None], 0
    num_groups, num_out, num_in = w.shape[1:]
    if group_sizes.shape != (num_groups,) or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}: with this w it must be "
            f"int32[{num_groups}], rows per group"
        )
    if x.dtype.name not in FLOATS or w.dtype != x.dtype:
        raise ValueError(
            f"x has dtype {x.dtype} and w {w.dtype}: they must be the same, one of {list(FLOATS)}"
        )
    problem = Problem(x.shape[0], num_groups, num_out, num_in, x.dtype)
    name, _ = REGISTRY.choose(implementation, lambda member: member.why_not(problem), platform)
    return _grouped_matmul(x, w, group_sizes, jnp.asarray(layer, jnp.int32), implementation=name)


# Jitted here so that the layers of an unrolled step are traced once, not once each.
@partial(jax.jit, static_argnames=("implementation",))
def _grouped_matmul(x, w, group_sizes, layer, *, implementation: str):
    return _differentiable(x, w, group_sizes, layer, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _differentiable(x, w, group_sizes, layer, implementation: str):
    return REGISTRY[implementation].grouped_matmul(x, w, group_sizes, layer)


def _forward(x, w, group_sizes, layer, implementation: str):
    return _differentiable(x, w, group_sizes, layer, implementation), (x, w, group_sizes, layer)


def _backward(implementation: str, kept, gradient):
    # Loops of run-time length and kernels have no gradient of their own.
    x, w, group_sizes, layer = kept
    pull = jax.vjp(lambda x, w: xla.grouped_matmul(x, w, group_sizes, layer), x, w)[1]
    return (*pull(gradient), None, None)


_differentiable.defvjp(_forward, _backward)
