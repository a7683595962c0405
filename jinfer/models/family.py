"""The model families: which there are, and what a family's file says."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig
from jinfer.models.weight_map import WeightMap

# Each has a file in this folder, named as its HF `model_type`, with a `FAMILY` in it.
MODEL_TYPES = (
    "deepseek_v2",
    "deepseek_v3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
)

# Models of text and images whose text part, which `text_config` describes, is a family above and computes text alone
# as that family does.
WRAPPERS = ("gemma3", "mistral3")


@dataclass(frozen=True)
class Family:
    """A family of models.

    config: reads config.json. weights: where each parameter is in the checkpoint.
    quantizations: values of quantization_config.quant_method that its weight map reads.
    """

    config: Callable[[Fields], ModelConfig]
    weights: WeightMap
    quantizations: tuple[str, ...] = ()


def family_of(model_type: str) -> Family:
    """The family of a supported model_type."""
    return importlib.import_module(f"jinfer.models.{model_type}").FAMILY
