"""Mistral: Llama with a sliding window, where the config has one: in every layer, or in those that layer_types names."""

from __future__ import annotations

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import (
    ModelConfig,
    common_config,
    read_layer_types,
    read_window,
)
from jinfer.models.weight_map import WeightMap

DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    config, window = common_config(fields), read_window(fields)
    types = read_layer_types(fields, config.num_hidden_layers)
    if types is None:
        return config.with_attention(window=window)
    return config.with_windows(types, window)


FAMILY = Family(config, WeightMap())
