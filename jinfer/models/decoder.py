"""The decoder: token ids in, hidden states and logits out. What differs between families is data of its config.

It sees arrays only. Which keys a query attends to, and where keys are kept, is the `attend` it is called with.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jinfer.layers.attention import Attend, LayerIndex
from jinfer.layers.linear import embed, project
from jinfer.layers.parameter import Build, parameter
from jinfer.layers.stack import LayerStack
from jinfer.models.hf_config import ModelConfig
from jinfer.models.layer import DecoderLayer
from pallas_kernels.tpu_layout import last_in_lanes


class Decoder(nnx.Module):
    """Embedding, layers, final norm and the head; parameters are abstract until `Params` fills them."""

    def __init__(self, config: ModelConfig, build: Build, *, scan: bool) -> None:
        table = (config.vocab_size, config.hidden_size)
        self.embedding = parameter(build, table, ("vocab", "embed"))
        parts = build.tensor_parallel
        own_rows = table[0] if table[0] % parts else table[0] // parts
        self.embed_by_product = build.platform == "tpu" and not last_in_lanes(
            own_rows, table[1], jnp.dtype(build.dtype).itemsize
        )
        self.stack = LayerStack(
            build,
            config.layers,
            lambda b, spec: DecoderLayer(spec, config.hidden_size, b),
            kinds=[layer.attention.kv_kind for layer in config.layers],
            scan=scan,
        )
        self.norm = config.norm.make(build, (config.hidden_size,))
        own = config.has_head and not config.tie_word_embeddings
        self.head = parameter(build, table, ("vocab", "embed")) if own else None
        self.head_bias = parameter(build, table[:1], ("vocab",)) if config.head_bias else None
        self.config = config
        self.weight_first, self.native_rows = build.weight_first, build.native_rows

    def __call__(
        self,
        tokens: Int[Array, "T"],
        positions: Int[Array, "T"],
        attend: Attend,
        cache: Any,
        lengths: Int[Array, "T"] | None = None,
        live: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "T E"], Any]:
        """Hidden states after the final norm, and the cache as `attend` left it.

        lengths: see `Rotary.tables`. live: tokens from it on are padding; None: all are real.
        """
        tables = {rotary: rotary.tables(positions, lengths) for rotary in self.config.rotaries}

        def body(layer: DecoderLayer, index: LayerIndex, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            return layer(carry[0], tables, attend, carry[1], index, live)

        x = embed(self.embedding[...], tokens, by_product=self.embed_by_product)
        if self.config.embedding_multiplier != 1.0:
            # In the activations' own dtype, as models that were trained so expect.
            x = x * jnp.asarray(self.config.embedding_multiplier, x.dtype)
        x, cache = self.stack(body, (x, cache))
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "R E"]) -> Float[Array, "R V"]:
        """float32 logits of hidden states; of no meaning without a head, which those who give them out refuse."""
        table, config = self.embedding if self.head is None else self.head, self.config
        logits = project(
            table[...],
            hidden,
            weight_first=self.weight_first,
            native_rows=self.native_rows,
            accumulate=jnp.float32,
        )
        if self.head_bias is not None:
            logits = logits + self.head_bias[...].astype(jnp.float32)
        if config.logit_multiplier != 1.0:
            logits = logits * config.logit_multiplier
        if config.logit_soft_cap is not None:
            logits = config.logit_soft_cap * jnp.tanh(logits / config.logit_soft_cap)
        return logits


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
