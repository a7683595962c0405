"""A small functional Llama: parameters are a flat dict under Hugging Face's names, the forward is one function.

Training needs the whole sequence at once and a mask that keeps packed documents apart, so this file has
no cache and no paging. Its logits agree with transformers' `LlamaForCausalLM` (a test holds that).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """Sizes of a Llama network; `to_hf` writes them as the fields of a Hugging Face config.json."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 48
    max_positions: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def to_hf(self) -> dict[str, Any]:
        """Returns the config.json fields of a `LlamaForCausalLM` with tied embeddings."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
        }

    @classmethod
    def from_hf(cls, fields: dict[str, Any]) -> TinyConfig:
        """Reads the sizes back from config.json fields that `to_hf` wrote."""
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["intermediate_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=fields["num_attention_heads"],
            num_kv_heads=fields["num_key_value_heads"],
            head_dim=fields["head_dim"],
            max_positions=fields["max_position_embeddings"],
            rope_theta=fields["rope_theta"],
            norm_eps=fields["rms_norm_eps"],
        )


def parameter_shapes(config: TinyConfig) -> dict[str, tuple[int, ...]]:
    """Returns every parameter's Hugging Face name and shape; matrices are `[out, in]`, embeddings `[V, E]`."""
    embed, feed = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, embed)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (embed,)
        shapes[prefix + "self_attn.q_proj.weight"] = (query, embed)
        shapes[prefix + "self_attn.k_proj.weight"] = (kv, embed)
        shapes[prefix + "self_attn.v_proj.weight"] = (kv, embed)
        shapes[prefix + "self_attn.o_proj.weight"] = (embed, query)
        shapes[prefix + "post_attention_layernorm.weight"] = (embed,)
        shapes[prefix + "mlp.gate_proj.weight"] = (feed, embed)
        shapes[prefix + "mlp.up_proj.weight"] = (feed, embed)
        shapes[prefix + "mlp.down_proj.weight"] = (embed, feed)
    shapes["model.norm.weight"] = (embed,)
    return shapes


def init_params(config: TinyConfig, seed: int) -> Params:
    """Draws float32 starting weights: normal, scaled by fan-in, residual outputs scaled down by depth."""
    rng = np.random.default_rng([seed, 7])
    params: Params = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            params[name] = jnp.ones(shape, jnp.float32)
            continue
        scale = 0.02 if "embed_tokens" in name else shape[1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            scale /= (2 * config.num_layers) ** 0.5
        params[name] = jnp.asarray(rng.normal(0.0, scale, shape), jnp.float32)
    return params


def count_parameters(config: TinyConfig) -> int:
    """Returns how many numbers the network holds; the tied output matrix counts once."""
    return sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * weight


def _linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


def _rope_tables(config: TinyConfig, length: int) -> tuple[jax.Array, jax.Array]:
    half = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    angles = np.arange(length)[:, None] / config.rope_theta ** half[None, :]
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `x` `[B, T, heads, D]`, pairing element `d` with `d + D/2` as Hugging Face's Llama does."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(
    params: Params, prefix: str, x: jax.Array, mask: jax.Array, rope, config: TinyConfig
) -> jax.Array:
    batch, length, _ = x.shape
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    q = _linear(x, params[prefix + "q_proj.weight"]).reshape(batch, length, heads, dim)
    k = _linear(x, params[prefix + "k_proj.weight"]).reshape(batch, length, kv_heads, dim)
    v = _linear(x, params[prefix + "v_proj.weight"]).reshape(batch, length, kv_heads, dim)
    q, k = _rotate(q, *rope), _rotate(k, *rope)
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim) * dim**-0.5
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k)
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, length, heads * dim)
    return _linear(mixed, params[prefix + "o_proj.weight"])


def forward(
    params: Params,
    tokens: jax.Array | np.ndarray,
    config: TinyConfig,
    segments: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """Runs the network over whole sequences.

    Args:
      params: float32 arrays under Hugging Face's names (`parameter_shapes`).
      tokens: int32 `[B, T]`.
      config: the sizes.
      segments: int32 `[B, T]`, or None. Positions attend to earlier positions of the same segment only,
        so that several documents share a row. Rotary attention depends on distances alone, so positions
        need not restart.

    Returns:
      float32 logits `[B, T, V]`.
    """
    length = tokens.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    rope = _rope_tables(config, length)
    x = jnp.take(params["model.embed_tokens.weight"], tokens, axis=0)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        normed = _rms_norm(x, params[prefix + "input_layernorm.weight"], config.norm_eps)
        x = x + _attention(params, prefix + "self_attn.", normed, mask, rope, config)
        normed = _rms_norm(x, params[prefix + "post_attention_layernorm.weight"], config.norm_eps)
        gate = jax.nn.silu(_linear(normed, params[prefix + "mlp.gate_proj.weight"]))
        up = _linear(normed, params[prefix + "mlp.up_proj.weight"])
        x = x + _linear(gate * up, params[prefix + "mlp.down_proj.weight"])
    x = _rms_norm(x, params["model.norm.weight"], config.norm_eps)
    return _linear(x, params["model.embed_tokens.weight"])
