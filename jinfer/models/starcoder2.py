"""StarCoder 2: layer norms, a plain feed-forward block, biases, and a window in every layer."""

from __future__ import annotations

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config, read_window
from jinfer.models.weight_map import WeightMap, plain

DEFAULTS = {
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "tie_word_embeddings": True,
}


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    config = common_config(
        fields, eps="norm_epsilon", attention_bias="use_bias", mlp_bias="use_bias", gated=False
    )
    return config.with_norm(kind="layer").with_attention(window=read_window(fields))


FAMILY = Family(
    config,
    WeightMap(
        layer={
            "mlp.up.weight": plain("mlp.c_fc.weight"),
            "mlp.up.bias": plain("mlp.c_fc.bias"),
            "mlp.down.weight": plain("mlp.c_proj.weight"),
            "mlp.down.bias": plain("mlp.c_proj.bias"),
        }
    ),
)
