"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): what is kept per token is one small latent vector.

A head's key is a product of the latent, and so is its value. Neither is ever made: the key's product is moved to the
query's side and the value's behind the attention ("absorbed"), so that all heads read one shared KV head, the latent
itself with the rotated part of the key behind it:

    query   [ q_nope W_key | rotated q_rope ]       H heads of L + rope numbers
    key     [ latent       | rotated k_rope ]       1 head
    value   [ latent       | (not used)     ]       the key again, which is kept once

Dimension letters: L latent; the rest as elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jinfer.layers.attention import Attend, KVKind, LayerIndex, RotaryTables, replicated_kv_heads
from jinfer.layers.linear import Linear
from jinfer.layers.norm import NormSpec
from jinfer.layers.parameter import Build, parameter
from jinfer.layers.rope import Rotary, rotate


@dataclass(frozen=True)
class MLASpec:
    """Multi-head latent attention, as data.

    latent: numbers kept per token, beside the rotated ones, of which there are rotary.dim. query_latent: queries are
    made from a latent of their own, of this size; None: from x. nope_dim, value_dim: of each head, the part of its key
    that is not rotated, and its value. scale: factor of the logits. norm: of both latents. bias: of the products that
    make the latents, and of the output's.
    """

    num_heads: int
    latent: int
    nope_dim: int
    value_dim: int
    scale: float
    rotary: Rotary
    norm: NormSpec
    query_latent: int | None = None
    bias: bool = False

    @property
    def kv_kind(self) -> KVKind:
        return KVKind(1, self.latent + self.rotary.dim, None, shared_values=True, value_dim=self.latent)

    def make(self, build: Build, embed: int) -> LatentAttention:
        """The module: (x [T, E], rotary tables, attend, cache, layer) -> ([T, E], cache)."""
        return LatentAttention(build, embed, self)


class LatentAttention(nnx.Module):
    """Latent attention over one KV head. kv_up [H, nope_dim + value_dim, L]: from the latent, each head's key and value."""

    def __init__(self, build: Build, embed: int, spec: MLASpec) -> None:
        heads, rope = spec.num_heads, spec.rotary.dim
        shape, axes = (heads, spec.nope_dim + rope), ("heads", "head_dim")
        source, small = spec.query_latent or embed, spec.query_latent is not None
        self.query_down = (
            Linear(build, (source,), (embed,), (None,), ("embed",), bias=spec.bias) if small else None
        )
        self.query_norm = spec.norm.make(build, (source,)) if small else None
        self.query = Linear(build, shape, (source,), axes, (None,))
        self.kv_down = Linear(build, (spec.latent + rope,), (embed,), (None,), ("embed",), bias=spec.bias)
        self.kv_norm = spec.norm.make(build, (spec.latent,))
        self.kv_up = parameter(
            build, (heads, spec.nope_dim + spec.value_dim, spec.latent), ("heads", "head_dim", None)
        )
        self.out = Linear(
            build, (embed,), (heads, spec.value_dim), ("embed",), ("heads", "head_dim"), bias=spec.bias
        )
        # One latent head is there once per device that holds a share of the query heads.
        self.num_kv_heads = replicated_kv_heads(1, build.tensor_parallel)
        self.spec = spec

    def __call__(
        self, x: Float[Array, "T E"], tables: RotaryTables, attend: Attend, cache: Any, layer: LayerIndex
    ) -> tuple[Float[Array, "T E"], Any]:
        spec, (cos, sin) = self.spec, tables[self.spec.rotary]
        interleaved, up = spec.rotary.interleaved, self.kv_up[...]
        q = x
        if self.query_down is not None and self.query_norm is not None:
            q = self.query_norm(self.query_down(x))
        q = self.query(q)
        q_nope, q_rope = q[:, :, : spec.nope_dim], q[:, :, spec.nope_dim :]
        q_latent = jnp.einsum("thn,hnl->thl", q_nope, up[:, : spec.nope_dim])
        q = jnp.concatenate([q_latent, rotate(q_rope, cos, sin, interleaved=interleaved)], axis=-1)

        kept = self.kv_down(x)[:, None]
        latent, k_rope = kept[:, :, : spec.latent], kept[:, :, spec.latent :]
        k_rope = rotate(k_rope, cos, sin, interleaved=interleaved)
        k = jnp.concatenate([self.kv_norm(latent), k_rope], axis=-1)
        k = jnp.broadcast_to(k, (x.shape[0], self.num_kv_heads, k.shape[2]))

        y, cache = attend(q, k, k, cache, layer, kind=spec.kv_kind, scale=spec.scale)
        heads = jnp.einsum("thl,hvl->thv", y[:, :, : spec.latent], up[:, spec.nope_dim :])
        return self.out(heads), cache
