"""Latent attention, absorbed into one KV head, against transformers' blocks, which make every head's key and value."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2RotaryEmbedding,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from jinfer.layers.attention import KVKind, LayerIndex, causal_attention
from jinfer.layers.mla import MLASpec
from jinfer.layers.norm import NormSpec
from jinfer.layers.parameter import Build
from jinfer.layers.rope import Rotary

EMBED, HEADS, LATENT, NOPE, ROPE, VALUE = 48, 4, 24, 12, 8, 20
SIZES: dict[str, Any] = {
    "hidden_size": EMBED,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
}
# (transformers' config, attention and rotary embedding; options; rotated pairs are neighbours)
CASES: dict[str, tuple[Any, Any, Any, dict[str, Any], bool]] = {
    "queries_from_x": (
        DeepseekV2Config,
        DeepseekV2Attention,
        DeepseekV2RotaryEmbedding,
        {"q_lora_rank": None},
        True,
    ),
    "queries_from_a_latent": (
        DeepseekV3Config,
        DeepseekV3Attention,
        DeepseekV3RotaryEmbedding,
        {"q_lora_rank": 28},
        True,
    ),
    "biases_and_halves": (
        DeepseekV3Config,
        DeepseekV3Attention,
        DeepseekV3RotaryEmbedding,
        {"q_lora_rank": 28, "attention_bias": True, "rope_interleave": False},
        False,
    ),
}
NAMES = {
    "q_a_proj": "query_down",
    "q_a_layernorm": "query_norm",
    "q_b_proj": "query",
    "q_proj": "query",
    "kv_a_proj_with_mqa": "kv_down",
    "kv_a_layernorm": "kv_norm",
    "o_proj": "out",
}


def spec_of(case: str) -> MLASpec:
    options, neighbours = CASES[case][3:]
    return MLASpec(
        num_heads=HEADS,
        latent=LATENT,
        nope_dim=NOPE,
        value_dim=VALUE,
        scale=(NOPE + ROPE) ** -0.5,
        rotary=Rotary(ROPE, 10000.0, interleaved=neighbours),
        norm=NormSpec(),
        query_latent=options["q_lora_rank"],
        bias=options.get("attention_bias", False),
    )


def random_block(case: str) -> tuple[Any, Any]:
    """transformers' attention with random weights, and its rotary embedding."""
    make_config, make_attention, make_rotary, options, _ = CASES[case]
    config = make_config(**SIZES, **options)
    config._attn_implementation = "eager"
    block = make_attention(config, 0).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    return block, make_rotary(config)


def bound(spec: MLASpec, block: Any, build: Build) -> Any:
    tensors = {name: jnp.asarray(tensor.detach().numpy()) for name, tensor in block.state_dict().items()}
    weights = {"kv_up": tensors.pop("kv_b_proj.weight")}
    for name, tensor in tensors.items():
        module, _, kind = name.partition(".")
        weights[f"{NAMES[module]}.{kind}"] = tensor
    graph, state = nnx.split(spec.make(build, EMBED))
    flat = [
        (path, p.replace(weights.pop(".".join(map(str, path))).reshape(p.get_value().shape)))
        for path, p in nnx.to_flat_state(state)
    ]
    assert not weights
    return nnx.merge(graph, nnx.from_flat_state(flat))


def expected_output(block: Any, rotary: Any, x: np.ndarray) -> np.ndarray:
    tokens = x.shape[0]
    wide = torch.from_numpy(x)[None]
    mask = torch.triu(torch.full((tokens, tokens), -torch.inf), 1)[None, None]
    with torch.no_grad():
        angles = rotary(wide, torch.arange(tokens)[None])
        y = block(hidden_states=wide, attention_mask=mask, position_embeddings=angles)
    return y[0][0].numpy()


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_latent_attention(case, devices):
    """With several devices the latent is there once per device, and each reads its own."""
    spec, (block, rotary) = spec_of(case), random_block(case)
    layer = bound(spec, block, Build(tensor_parallel=devices))
    x = np.random.default_rng(0).normal(size=(37, EMBED)).astype(np.float32)
    seen = {}

    def attend(q, k, v, cache, layer, *, kind, scale, soft_cap=None, sinks=None):
        seen.update(kind=kind, q=q.shape, k=k.shape)
        return causal_attention(q[None], k[None], v[None], scale)[0], cache

    tables = {spec.rotary: spec.rotary.tables(jnp.arange(37))}
    index = LayerIndex(jnp.int32(0), jnp.int32(0))
    actual = jax.jit(lambda x: layer(x, tables, attend, None, index)[0])(x)
    np.testing.assert_allclose(actual, expected_output(block, rotary, x), rtol=2e-4, atol=2e-4)
    # One latent and one rotated key for all heads: what the paper keeps.
    assert seen["kind"] == KVKind(1, LATENT + ROPE, None, shared_values=True, value_dim=LATENT)
    assert seen["q"] == (37, HEADS, LATENT + ROPE)
    assert seen["k"] == (37, devices, LATENT + ROPE)
