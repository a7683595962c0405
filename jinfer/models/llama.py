"""The Llama family: llama 1, 2, 3, 3.1, 3.2 and everything that states model_type llama."""

from __future__ import annotations

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config
from jinfer.models.weight_map import WeightMap


def config(fields: Fields) -> ModelConfig:
    return common_config(fields, attention_bias="attention_bias", mlp_bias="mlp_bias")


FAMILY = Family(config, WeightMap())
