"""Gemma 3, the text model: Gemma 2 without the cap of attention, with norms of queries and keys, five layers with a
window to one without, and another rotary base for those."""

from __future__ import annotations

from typing import Any

from jinfer.layers.rope import Rotary
from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.gemma2 import WEIGHTS, sandwich_config
from jinfer.models.hf_config import (
    FULL,
    SLIDING,
    ModelConfig,
    read_layer_types,
    read_window,
    with_attention,
)
from jinfer.models.rope_config import section_rotary

# Published files leave many of these out.
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
BASES = {FULL: ("rope_theta", 1_000_000.0), SLIDING: ("rope_local_base_freq", 10_000.0)}


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    fields.refuse("attn_logit_softcapping")
    # Its two rotary embeddings are read here, so what all models share reads none.
    sizes = {key: value for key, value in fields.values.items() if not key.startswith("rope_")}
    plain = sandwich_config(fields.with_values(sizes))
    depth = plain.num_hidden_layers
    period = fields.integer("sliding_window_pattern", low=1, high=4096, default=6)
    fields.idle("rope_theta", "rope_local_base_freq")  # where rope_parameters has them
    types = read_layer_types(fields, depth) or [SLIDING if (i + 1) % period else FULL for i in range(depth)]
    rotary = {kind: rotary_of(fields, kind, plain) for kind in (FULL, SLIDING)}
    config = plain.with_attention(qk_norm=plain.norm).with_windows(types, read_window(fields))
    return config.map_layers(lambda i, layer: with_attention(layer, rotary=rotary[types[i]]))


def rotary_of(fields: Fields, kind: str, sizes: ModelConfig) -> Rotary:
    """The rotary embedding of one kind of layer. Older files write the bases outside, and scale full layers only."""
    nested = fields.section("rope_parameters")
    section = nested.section(kind) if nested is not None else None
    values: dict[str, Any] = dict(section.values) if section is not None else {}
    old = fields.section("rope_scaling")
    if old is not None and kind == FULL:
        values |= old.values
    key, default = BASES[kind]
    values.setdefault("rope_theta", fields.number(key, low=1.0, high=1e15, default=default))
    where = f"{fields.where}: rope_parameters: {kind}"
    return section_rotary(fields, Fields(values, where), sizes.head_dim, sizes.max_position_embeddings)


FAMILY = Family(config, WEIGHTS)
