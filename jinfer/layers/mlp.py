"""The gated feed-forward block."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from jinfer.layers.linear import Linear
from jinfer.layers.parameter import Build

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)). Gate and up are one product: weight [2, F, E]."""

    def __init__(self, build: Build, embed: int, feed_forward: int, activation: str, *, bias: bool) -> None:
        self.gate_up = Linear(
            build, (2, feed_forward), (embed,), (None, "feed_forward"), ("embed",), bias=bias
        )
        self.down = Linear(build, (embed,), (feed_forward,), ("embed",), ("feed_forward",), bias=bias)
        self.activation = activation

    def __call__(self, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
        both = self.gate_up(x)
        return self.down(ACTIVATIONS[self.activation](both[:, 0]) * both[:, 1])
