"""The decoder: token ids in, hidden states and logits out. What differs between families is data of its config.

It sees arrays only. Which keys a query attends to, and where keys are kept, is the `attend` it is called with.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jinfer.layers.attention import Attend, Attention
from jinfer.layers.linear import embed, project
from jinfer.layers.mlp import GatedMLP
from jinfer.layers.norm import RMSNorm
from jinfer.layers.parameter import Build, parameter
from jinfer.layers.rope import Rotary
from jinfer.layers.stack import LayerStack
from jinfer.models.hf_config import ModelConfig

_ROTARY_FIELDS = {f.name for f in fields(Rotary)}


def rotary_of(config: ModelConfig) -> Rotary:
    """The rotary embedding that a model's config asks for."""
    scaling = config.rope_scaling
    told = {f.name: getattr(scaling, f.name) for f in fields(scaling) if f.name in _ROTARY_FIELDS}
    return replace(
        Rotary(dim=config.head_dim, theta=config.rope_theta),
        kind=scaling.rope_type,
        original=scaling.original_max_position_embeddings or config.max_position_embeddings,
        # A field that the config leaves open keeps the default of the method's paper.
        **{name: value for name, value in told.items() if value is not None},
    )


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        self.attention_norm = RMSNorm(build, config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(
            build,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
        )
        self.mlp_norm = RMSNorm(build, config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(
            build, config.hidden_size, config.intermediate_size, config.hidden_act, bias=config.mlp_bias
        )

    def __call__(
        self, x: Array, rope: tuple[Array, Array], attend: Attend, cache: Any, layer: Array
    ) -> tuple[Array, Any]:
        y, cache = self.attention(self.attention_norm(x), rope, attend, cache, layer)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """Embedding, layers, final norm and the head; parameters are abstract until `Params` fills them."""

    def __init__(self, config: ModelConfig, build: Build, *, scan: bool) -> None:
        self.embedding = parameter(build, (config.vocab_size, config.hidden_size), ("vocab", "embed"))
        self.stack = LayerStack(build, config.num_hidden_layers, lambda b: DecoderLayer(config, b), scan=scan)
        self.norm = RMSNorm(build, config.hidden_size, config.rms_norm_eps)
        self.head = (
            None
            if config.tie_word_embeddings
            else parameter(build, (config.vocab_size, config.hidden_size), ("vocab", "embed"))
        )
        self.rotary = rotary_of(config)
        self.weight_first = build.weight_first

    def __call__(
        self,
        tokens: Int[Array, "T"],
        positions: Int[Array, "T"],
        attend: Attend,
        cache: Any,
        lengths: Int[Array, "T"] | None = None,
    ) -> tuple[Float[Array, "T E"], Any]:
        """Hidden states after the final norm, and the cache as `attend` left it. `lengths`: see `Rotary.tables`."""
        rope = self.rotary.tables(positions, lengths)

        def body(layer: DecoderLayer, index: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            return layer(carry[0], rope, attend, carry[1], index)

        x, cache = self.stack(body, (embed(self.embedding[...], tokens), cache))
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "R E"]) -> Float[Array, "R V"]:
        """float32 logits of hidden states."""
        table = self.embedding if self.head is None else self.head
        return project(table[...], hidden, weight_first=self.weight_first, accumulate=jnp.float32)


@dataclass(frozen=True)
class ModelSpec:
    """Everything static about a model: hashable, so that jit may key on it."""

    config: ModelConfig
    build: Build
    scan: bool


@functools.lru_cache(maxsize=8)
def skeleton(spec: ModelSpec) -> tuple[Any, Any, dict[str, nnx.Param]]:
    """(graph definition, tree of the state, abstract parameter by path) of a spec's decoder."""
    decoder = Decoder(spec.config, spec.build, scan=spec.scan)
    graph, state = nnx.split(decoder)
    leaves, tree = jax.tree.flatten(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    paths = [".".join(str(part) for part in path) for path, _ in nnx.to_flat_state(state)]
    if len(paths) != len(leaves):
        raise AssertionError("state leaves and paths differ in number")
    return graph, tree, dict(zip(paths, leaves, strict=True))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["spec"])
@dataclass(frozen=True)
class Params:
    """A model's parameters as a pytree of plain arrays by path; differentiable, and light to pass through jit."""

    arrays: dict[str, Any]
    spec: ModelSpec

    def bind(self) -> Decoder:
        """The decoder that computes with these arrays."""
        graph, tree, abstract = skeleton(self.spec)
        leaves = [param.replace(self.arrays[path]) for path, param in abstract.items()]
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))
