"""Phi 1, 1.5 and 2: attention and a plain feed-forward block side by side, layer norms, partly rotated heads."""

from __future__ import annotations

from dataclasses import replace

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config
from jinfer.models.weight_map import WeightMap, plain, split_heads_in

DEFAULTS = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    config = common_config(
        fields, eps="layer_norm_eps", attention_bias=True, mlp_bias=True, gated=False, partial_rotary=0.5
    )
    config = config.with_norm(kind="layer").with_layers(parallel=True)
    if fields.boolean("qk_layernorm", default=False):
        config = config.with_attention(qk_norm=config.norm)
    return replace(config, head_bias=True)


FAMILY = Family(
    config,
    WeightMap(
        top={
            "norm.weight": plain("model.final_layernorm.weight"),
            "norm.bias": plain("model.final_layernorm.bias"),
        },
        layer={
            "attention.out.weight": split_heads_in("self_attn.dense.weight"),
            "attention.out.bias": plain("self_attn.dense.bias"),
            "attention.q_norm.weight": plain("self_attn.q_layernorm.weight"),
            "attention.q_norm.bias": plain("self_attn.q_layernorm.bias"),
            "attention.k_norm.weight": plain("self_attn.k_layernorm.weight"),
            "attention.k_norm.bias": plain("self_attn.k_layernorm.bias"),
            "mlp.up.weight": plain("mlp.fc1.weight"),
            "mlp.up.bias": plain("mlp.fc1.bias"),
            "mlp.down.weight": plain("mlp.fc2.weight"),
            "mlp.down.bias": plain("mlp.fc2.bias"),
        },
    ),
)
