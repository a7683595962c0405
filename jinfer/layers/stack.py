"""The loop over equal layers: scanned over stacked weights, or unrolled over separate ones.

On TPU a scan costs no copy and makes compile time independent of depth. On GPU and CPU a scan copies every layer's
weights every step, so there the layers stay apart. One body serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jinfer.layers.parameter import Build

Carry = TypeVar("Carry")


class LayerStack(nnx.Module):
    """`depth` layers made by `make(build)`.

    Unrolled, `layers` is a list; scanned, `layer` is one layer whose parameters have a leading dimension `depth`.
    """

    def __init__(self, build: Build, depth: int, make: Callable[[Build], nnx.Module], *, scan: bool) -> None:
        self.depth, self.scan = depth, scan
        if scan:
            self.layer = make(replace(build, stack=depth))
        else:
            self.layers = nnx.List([make(build) for _ in range(depth)])

    def __call__(self, body: Callable[[Any, jax.Array, Carry], Carry], carry: Carry) -> Carry:
        """Runs `carry = body(layer, index, carry)` for every layer; index is an int32 scalar."""
        if self.scan:
            graph, weights = nnx.split(self.layer)

            def step(carry: Carry, xs: tuple[Any, jax.Array]) -> tuple[Carry, None]:
                return body(nnx.merge(graph, xs[0]), xs[1], carry), None

            return lax.scan(step, carry, (weights, jnp.arange(self.depth, dtype=jnp.int32)))[0]

        # Equal layers are traced and lowered once: the jitted body is a function that the step calls `depth` times.
        graph = nnx.split(self.layers[0])[0]

        @jax.jit
        def call(weights: Any, index: jax.Array, carry: Carry) -> Carry:
            return body(nnx.merge(graph, weights), index, carry)

        for i, layer in enumerate(self.layers):
            carry = call(nnx.split(layer)[1], jnp.int32(i), carry)
        return carry
