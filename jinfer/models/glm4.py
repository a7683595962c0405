"""GLM 4: norms around each block, half of each head rotated in neighbouring pairs, gate and up in one tensor."""

from __future__ import annotations

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config
from jinfer.models.weight_map import WeightMap, plain, split_pair

DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
}


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    fields.refuse("rope_interleave", True)
    config = common_config(fields, attention_bias="attention_bias", partial_rotary=0.5, interleaved=True)
    return config.with_attention(out_bias=False).with_layers(post_norm=True)


FAMILY = Family(
    config,
    WeightMap(
        layer={
            "attention_post_norm.weight": plain("post_self_attn_layernorm.weight"),
            "mlp_post_norm.weight": plain("post_mlp_layernorm.weight"),
            "mlp.gate_up.weight": split_pair("mlp.gate_up_proj.weight"),
        }
    ),
)
