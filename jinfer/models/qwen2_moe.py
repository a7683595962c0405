"""Qwen 1.5 and 2 with mixtures of experts: a gated block for all tokens beside them; some layers may be dense."""

from __future__ import annotations

from dataclasses import replace

from jinfer.layers.mlp import MLPSpec
from jinfer.layers.moe import MoESpec
from jinfer.models.expert_weights import routed, shared
from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import (
    FULL,
    SLIDING,
    ModelConfig,
    common_config,
    read_activation,
    read_layer_types,
    read_switched_window,
)
from jinfer.models.mixtral import read_router
from jinfer.models.weight_map import WeightMap, plain

DEFAULTS = {
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "sliding_window": 4096,
}
WEIGHTS = {
    **routed(),
    **shared("mlp.shared_expert"),
    "mlp.shared_gate.weight": plain("mlp.shared_expert_gate.weight"),
}


def read_experts(fields: Fields, count: str) -> MoESpec:
    """The experts as Qwen's files state them."""
    normalize = fields.boolean("norm_topk_prob", default=False)
    width = fields.integer("moe_intermediate_size", low=1, high=2**22)
    return MoESpec(
        read_router(fields, count, normalize=normalize), width, read_activation(fields, "hidden_act")
    )


def with_experts(fields: Fields, dense: ModelConfig, experts: MoESpec) -> ModelConfig:
    """The config with experts in the layers that have them; the others keep their block."""
    depth = dense.num_hidden_layers
    step = fields.integer("decoder_sparse_step", low=1, high=4096, default=1)
    without = fields.integers("mlp_only_layers", low=0, high=depth - 1)
    return dense.map_layers(
        lambda i, layer: layer if i in without or (i + 1) % step else replace(layer, mlp=experts)
    )


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    dense = common_config(fields).with_attention(qkv_bias=fields.boolean("qkv_bias", default=True))
    used = fields.boolean("use_sliding_window", default=False)
    first_full = fields.integer("max_window_layers", low=0, high=2**31 - 1, default=28)
    depth = dense.num_hidden_layers
    types = read_layer_types(fields, depth) or [
        SLIDING if used and i < first_full and i % 2 == 0 else FULL for i in range(depth)
    ]
    dense = dense.with_windows(types, read_switched_window(fields))
    width = fields.integer("shared_expert_intermediate_size", low=1, high=2**22)
    beside = MLPSpec(width, read_activation(fields, "hidden_act"))
    experts = replace(read_experts(fields, "num_experts"), shared=beside, shared_gate=True)
    return with_experts(fields, dense, experts)


FAMILY = Family(config, WeightMap(layer=WEIGHTS))
