"""Qwen 3: Llama with a norm of each head's queries and keys; upper layers may have a window."""

from __future__ import annotations

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config
from jinfer.models.qwen2 import with_upper_windows
from jinfer.models.weight_map import WeightMap

DEFAULTS = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    plain = common_config(fields, attention_bias="attention_bias")
    return with_upper_windows(fields, plain.with_attention(qk_norm=plain.norm))


FAMILY = Family(config, WeightMap())
