"""Qwen 3 with mixtures of experts; some layers may be dense."""

from __future__ import annotations

from jinfer.models.expert_weights import routed
from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config, read_switched_window
from jinfer.models.qwen2_moe import read_experts, with_experts
from jinfer.models.weight_map import WeightMap

DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "sliding_window": 4096,
}


def config(fields: Fields) -> ModelConfig:
    # transformers 5 writes one key, published files have the other.
    fields = fields.with_aliases({"num_local_experts": "num_experts"}).with_defaults(DEFAULTS)
    dense = common_config(fields, attention_bias="attention_bias")
    dense = dense.with_attention(qk_norm=dense.norm, window=read_switched_window(fields))
    return with_experts(fields, dense, read_experts(fields, "num_experts"))


FAMILY = Family(config, WeightMap(layer=routed()))
