"""Granite: Llama with factors of embeddings, attention logits, block outputs and logits."""

from __future__ import annotations

from dataclasses import replace

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config
from jinfer.models.weight_map import WeightMap


def factor(fields: Fields, name: str) -> float:
    return fields.number(name, low=1e-6, high=1e6, default=1.0)


def config(fields: Fields) -> ModelConfig:
    config = common_config(fields, attention_bias="attention_bias", mlp_bias="mlp_bias")
    config = config.with_attention(scale=factor(fields, "attention_multiplier"))
    config = config.with_layers(residual_multiplier=factor(fields, "residual_multiplier"))
    return replace(
        config,
        embedding_multiplier=factor(fields, "embedding_multiplier"),
        logit_multiplier=1 / factor(fields, "logits_scaling"),
    )


FAMILY = Family(config, WeightMap())
