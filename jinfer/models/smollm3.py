"""SmolLM 3: Llama with layers that have no position embedding; those may have a window."""

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
    with_attention,
)
from jinfer.models.weight_map import WeightMap

DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True}


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    config = common_config(fields, attention_bias="attention_bias", mlp_bias="mlp_bias", theta=2_000_000.0)
    depth = config.num_hidden_layers
    rotated = fields.integers("no_rope_layers", low=0, high=1)  # 1 says that the layer is rotated
    fields.idle("no_rope_layer_interval")  # where the layers are named
    if not rotated:
        every = fields.integer("no_rope_layer_interval", low=1, high=4096, default=4)
        rotated = tuple(int((i + 1) % every != 0) for i in range(depth))
    if len(rotated) < depth:
        raise fields.error("no_rope_layers", f"a list with at least {depth} entries, one per layer")
    window = read_switched_window(fields)
    types = read_layer_types(fields, depth) or [
        FULL if window is None or rotated[i] else SLIDING for i in range(depth)
    ]
    return config.with_windows(types, window).map_layers(
        lambda i, layer: layer if rotated[i] else with_attention(layer, rotary=None)
    )


FAMILY = Family(config, WeightMap())
