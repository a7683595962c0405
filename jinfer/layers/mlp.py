"""The feed-forward block, gated or plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class MLPSpec:
    """A dense feed-forward block, as data. gated: down(act(gate(x)) * up(x)); else down(act(up(x)))."""

    feed_forward: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False

    def make(self, build: Build, embed: int) -> GatedMLP | PlainMLP:
        """The module: x [T, E] -> [T, E]. It takes padded tokens as they are: `live` changes nothing."""
        return (GatedMLP if self.gated else PlainMLP)(build, embed, self)


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)). Gate and up are one product: weight [2, F, E]."""

    def __init__(self, build: Build, embed: int, spec: MLPSpec) -> None:
        width = spec.feed_forward
        self.gate_up = Linear(build, (2, width), (embed,), (None, "feed_forward"), ("embed",), bias=spec.bias)
        self.down = Linear(build, (embed,), (width,), ("embed",), ("feed_forward",), bias=spec.bias)
        self.activation = spec.activation

    def __call__(self, x: Float[Array, "T E"], live: Any = None) -> Float[Array, "T E"]:
        both = self.gate_up(x)
        return self.down(ACTIVATIONS[self.activation](both[:, 0]) * both[:, 1])


class PlainMLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, build: Build, embed: int, spec: MLPSpec) -> None:
        width = spec.feed_forward
        self.up = Linear(build, (width,), (embed,), ("feed_forward",), ("embed",), bias=spec.bias)
        self.down = Linear(build, (embed,), (width,), ("embed",), ("feed_forward",), bias=spec.bias)
        self.activation = spec.activation

    def __call__(self, x: Float[Array, "T E"], live: Any = None) -> Float[Array, "T E"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))
