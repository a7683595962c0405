"""OLMo 2: norms after the blocks only, and norms over all queries and over all keys of a token."""

from __future__ import annotations

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config
from jinfer.models.weight_map import WeightMap, plain, repeat_heads, split_heads

DEFAULTS = {"rms_norm_eps": 1e-5}


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    config = common_config(fields, attention_bias="attention_bias").with_norm(wide=True)
    config = config.with_attention(qk_norm=config.norm, qk_norm_over="all")
    return config.with_layers(pre_norm=False, post_norm=True)


FAMILY = Family(
    config,
    WeightMap(
        layer={
            "attention.q_norm.weight": split_heads("self_attn.q_norm.weight"),
            "attention.k_norm.weight": repeat_heads("self_attn.k_norm.weight"),
            "attention_post_norm.weight": plain("post_attention_layernorm.weight"),
            "mlp_post_norm.weight": plain("post_feedforward_layernorm.weight"),
        }
    ),
)
