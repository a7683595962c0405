"""The attention block: projections, norms and rotary here; which keys a query sees is the caller's `Attend`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jinfer.layers.linear import Linear
from jinfer.layers.norm import NormSpec
from jinfer.layers.parameter import Build, parameter
from jinfer.layers.rope import Rotary, rotate

# (cos, sin) of this step's tokens for every kind of rotary embedding that the model has.
RotaryTables = Mapping[Rotary, tuple[Array, Array]]


class LayerIndex(NamedTuple):
    """Where a layer stands, int32 scalars: among all layers, and among those whose KV pages are of its kind."""

    overall: jax.Array
    in_kind: jax.Array


class KVKind(NamedTuple):
    """What one layer keeps per token. Layers of equal kind may share a pool of pages.

    window: tokens that a query can see, its own included; None: all of them.
    shared_values: its keys are its values too, and are kept once.
    value_dim: of such keys, the leading numbers that are read as values; None: all. An `Attend` may return no more.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None
    shared_values: bool = False
    value_dim: int | None = None


class Attend(Protocol):
    """Keeps this step's keys and values and attends: (q [T,H,D], k [T,K,D], v [T,K,D], cache, layer) -> (y, cache).

    layer: where the layer stands. kind, scale and soft_cap are static; kind.window is the sliding window.
    scale, soft_cap, sinks [H] and the window mean what they mean in `pallas_kernels.paged_attention.attend`.
    """

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: Any,
        layer: LayerIndex,
        *,
        kind: KVKind,
        scale: float,
        soft_cap: float | None = None,
        sinks: Array | None = None,
    ) -> tuple[Array, Any]: ...


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention, as data.

    scale: factor of the logits. rotary: None for a layer without position embedding.
    window: tokens that a query sees, its own included; None: all. soft_cap: logits become cap * tanh(logits / cap).
    sinks: one learned logit per head that takes part in each softmax and carries no value.
    qk_norm: of queries and keys before the rotation, over each head, or over all heads together (qk_norm_over="all").
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rotary: Rotary | None
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormSpec | None = None
    qk_norm_over: str = "head"

    @property
    def kv_kind(self) -> KVKind:
        return KVKind(self.num_kv_heads, self.head_dim, self.window)

    def make(self, build: Build, embed: int) -> Attention:
        """The module: (x [T, E], rotary tables, attend, cache, layer) -> ([T, E], cache)."""
        return Attention(build, embed, self)


def replicated_kv_heads(num_kv_heads: int, tensor_parallel: int) -> int:
    """KV heads on the mesh: as many as there are, or one per device where there are fewer."""
    return max(num_kv_heads, tensor_parallel)


class Attention(nnx.Module):
    """Grouped-query attention. qkv weight [K, G + 2, D, E]: per KV head its G query heads, then k, then v, so that one
    product makes all three and sharding on K keeps every group whole on its device."""

    def __init__(self, build: Build, embed: int, spec: AttentionSpec) -> None:
        self.spec = spec
        heads, size = spec.num_heads, spec.head_dim
        self.num_kv_heads = replicated_kv_heads(spec.num_kv_heads, build.tensor_parallel)
        self.group = heads // self.num_kv_heads
        self.qkv = Linear(
            build,
            (self.num_kv_heads, self.group + 2, size),
            (embed,),
            ("kv_heads", None, "head_dim"),
            ("embed",),
            bias=spec.qkv_bias,
        )
        self.out = Linear(
            build, (embed,), (heads, size), ("embed",), ("heads", "head_dim"), bias=spec.out_bias
        )
        self.sinks = parameter(build, (heads,), ("heads",)) if spec.sinks else None
        self.q_norm, self.k_norm = self._qk_norms(build)

    def _qk_norms(self, build: Build) -> tuple[Any, Any]:
        spec, size = self.spec, self.spec.head_dim
        if spec.qk_norm is None:
            return None, None
        if spec.qk_norm_over == "head":
            return spec.qk_norm.make(build, (size,)), spec.qk_norm.make(build, (size,))
        # A KV head that is there several times weighs as much as every other, so the mean is the same.
        return (
            spec.qk_norm.make(build, (spec.num_heads, size), ("heads", "head_dim")),
            spec.qk_norm.make(build, (self.num_kv_heads, size), ("kv_heads", "head_dim")),
        )

    def __call__(
        self, x: Float[Array, "T E"], tables: RotaryTables, attend: Attend, cache: Any, layer: LayerIndex
    ) -> tuple[Float[Array, "T E"], Any]:
        spec, qkv = self.spec, self.qkv(x)
        q = qkv[:, :, : self.group].reshape(x.shape[0], spec.num_heads, spec.head_dim)
        k, v = qkv[:, :, self.group], qkv[:, :, self.group + 1]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.rotary is not None:
            cos, sin = tables[spec.rotary]
            q, k = (rotate(t, cos, sin, interleaved=spec.rotary.interleaved) for t in (q, k))
        y, cache = attend(
            q,
            k,
            v,
            cache,
            layer,
            kind=spec.kv_kind,
            scale=spec.scale,
            soft_cap=spec.soft_cap,
            sinks=None if self.sinks is None else self.sinks[...],
        )
        return self.out(y), cache


def causal_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B S H D"]:
    """Dense causal attention without a cache, differentiable: softmax(cap(scale * q k^T) + mask) v in float32."""
    b, s, h, d = q.shape
    groups = q.reshape(b, s, k.shape[2], h // k.shape[2], d)
    logits = jnp.einsum("bqkgd,bskd->bkgqs", groups, k, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    query, key = jnp.arange(s)[:, None], jnp.arange(s)[None, :]
    mask = query >= key
    if window is not None:
        mask &= query - key < window
    logits = jnp.where(mask, logits, -jnp.inf)
    if sinks is not None:
        column = sinks.astype(jnp.float32).reshape(1, *groups.shape[2:4], 1, 1)
        column = jnp.broadcast_to(column, (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, column], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :s]
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, v.astype(jnp.float32)).astype(v.dtype).reshape(b, s, h, d)
