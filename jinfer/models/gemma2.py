"""Gemma 2: Gemma with norms around each block, soft caps, and a window in every other layer."""

from __future__ import annotations

from dataclasses import replace

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.gemma import gemma_config
from jinfer.models.hf_config import FULL, SLIDING, ModelConfig, read_layer_types, read_window
from jinfer.models.weight_map import WeightMap, plain

DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
# Four norms per layer; the second one in the file is of the attention's output.
WEIGHTS = WeightMap(
    layer={
        "attention_post_norm.weight": plain("post_attention_layernorm.weight"),
        "mlp_norm.weight": plain("pre_feedforward_layernorm.weight"),
        "mlp_post_norm.weight": plain("post_feedforward_layernorm.weight"),
    }
)


def read_cap(fields: Fields, key: str) -> float | None:
    return fields.number(key, low=1e-6, default=None)


def sandwich_config(fields: Fields) -> ModelConfig:
    """What Gemma 2 and 3 share."""
    config = gemma_config(fields, activation="hidden_activation").with_layers(post_norm=True)
    scale = fields.number("query_pre_attn_scalar", low=1e-6) ** -0.5
    config = replace(config, logit_soft_cap=read_cap(fields, "final_logit_softcapping"))
    return config.with_attention(scale=scale)


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    config = sandwich_config(fields).with_attention(soft_cap=read_cap(fields, "attn_logit_softcapping"))
    depth = config.num_hidden_layers
    types = read_layer_types(fields, depth) or [FULL if i % 2 else SLIDING for i in range(depth)]
    return config.with_windows(types, read_window(fields))


FAMILY = Family(config, WEIGHTS)
