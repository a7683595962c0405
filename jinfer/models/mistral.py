"""Mistral: Llama with a sliding window in every layer, where the config has one."""

from __future__ import annotations

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config, read_window
from jinfer.models.weight_map import WeightMap

DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    return common_config(fields).with_attention(window=read_window(fields))


FAMILY = Family(config, WeightMap())
