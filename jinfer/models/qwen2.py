"""Qwen 2 and 2.5: Llama with biases of queries, keys and values; upper layers may have a window."""

from __future__ import annotations

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import (
    FULL,
    SLIDING,
    ModelConfig,
    common_config,
    read_layer_types,
    read_switched_window,
)
from jinfer.models.weight_map import WeightMap

DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}


def with_upper_windows(fields: Fields, config: ModelConfig) -> ModelConfig:
    """The config with windows as Qwen's files state them."""
    window = read_switched_window(fields)
    first = fields.integer("max_window_layers", low=0, high=2**31 - 1, default=28)
    depth = config.num_hidden_layers
    types = read_layer_types(fields, depth) or [
        SLIDING if window is not None and i >= first else FULL for i in range(depth)
    ]
    return config.with_windows(types, window)


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    return with_upper_windows(fields, common_config(fields).with_attention(qkv_bias=True))


FAMILY = Family(config, WeightMap())
