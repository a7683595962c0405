"""The attention block: projections and rotary here; which keys a query sees is the caller's `Attend`."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jinfer.layers.linear import Linear
from jinfer.layers.parameter import Build
from jinfer.layers.rope import rotate


class Attend(Protocol):
    """Keeps this step's keys and values and attends: (q [T,H,D], k [T,K,D], v [T,K,D], cache, layer) -> (y, cache)."""

    def __call__(self, q: Array, k: Array, v: Array, cache: Any, layer: jax.Array) -> tuple[Array, Any]: ...


def replicated_kv_heads(num_kv_heads: int, tensor_parallel: int) -> int:
    """KV heads on the mesh: as many as there are, or one per device where there are fewer."""
    return max(num_kv_heads, tensor_parallel)


class Attention(nnx.Module):
    """Grouped-query attention. qkv weight [K, G + 2, D, E]: per KV head its G query heads, then k, then v, so that one
    product makes all three and sharding on K keeps every group whole on its device."""

    def __init__(
        self,
        build: Build,
        embed: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool,
        out_bias: bool,
    ) -> None:
        self.num_kv_heads = replicated_kv_heads(num_kv_heads, build.tensor_parallel)
        self.group = num_heads // self.num_kv_heads
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = Linear(
            build,
            (self.num_kv_heads, self.group + 2, head_dim),
            (embed,),
            ("kv_heads", None, "head_dim"),
            ("embed",),
            bias=qkv_bias,
        )
        self.out = Linear(
            build, (embed,), (num_heads, head_dim), ("embed",), ("heads", "head_dim"), bias=out_bias
        )

    def __call__(
        self, x: Float[Array, "T E"], rope: tuple[Array, Array], attend: Attend, cache: Any, layer: jax.Array
    ) -> tuple[Float[Array, "T E"], Any]:
        qkv = self.qkv(x)
        q = qkv[:, :, : self.group].reshape(x.shape[0], self.num_heads, self.head_dim)
        k, v = qkv[:, :, self.group], qkv[:, :, self.group + 1]
        q, k = rotate(q, *rope), rotate(k, *rope)
        y, cache = attend(q, k, v, cache, layer)
        return self.out(y), cache


def causal_attention(
    q: Float[Array, "B S H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], scale: float
) -> Float[Array, "B S H D"]:
    """Dense causal attention without a cache, differentiable: softmax(scale * q k^T + mask) v in float32."""
    b, s, h, d = q.shape
    groups = q.reshape(b, s, k.shape[2], h // k.shape[2], d)
    logits = jnp.einsum("bqkgd,bskd->bkgqs", groups, k, preferred_element_type=jnp.float32) * scale
    mask = jnp.arange(s)[:, None] >= jnp.arange(s)[None, :]
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(b, s, h, d)
