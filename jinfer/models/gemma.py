"""Gemma: scaled embeddings, norms whose weight is around zero, tanh-gated feed-forward, tied head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config
from jinfer.models.weight_map import WeightMap

DEFAULTS = {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def gemma_config(fields: Fields, **options: Any) -> ModelConfig:
    """What all Gemma models share; options as of `common_config`."""
    fields.refuse("use_bidirectional_attention", False)
    config = common_config(fields, attention_bias="attention_bias", **options)
    config = replace(config, embedding_multiplier=config.hidden_size**0.5)
    return config.with_norm(offset=1.0, wide=True)


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    if fields.string("hidden_act") == "gelu":
        # The first releases wrote "gelu" and meant its tanh approximation.
        fields = fields.with_values({**fields.values, "hidden_act": "gelu_pytorch_tanh"})
    fields.refuse("hidden_activation", fields.values["hidden_act"])
    return gemma_config(fields)


FAMILY = Family(config, WeightMap())
