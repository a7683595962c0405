"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from jinfer.layers.moe import MoESpec, RouterSpec
from jinfer.models.expert_weights import routed
from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config, read_activation, read_window
from jinfer.models.weight_map import WeightMap

DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def read_router(fields: Fields, count: str, **settings: object) -> RouterSpec:
    """A router over as many experts as the file says under this key."""
    experts = fields.integer(count, low=1, high=2**16)
    chosen = fields.integer("num_experts_per_tok", low=1, high=experts)
    return RouterSpec(experts, chosen, **settings)  # pyright: ignore[reportArgumentType]


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_aliases({"num_experts": "num_local_experts"}).with_defaults(DEFAULTS)
    dense = common_config(fields, theta=1e6).with_attention(window=read_window(fields))
    experts = MoESpec(
        read_router(fields, "num_local_experts", normalize=True),
        dense.intermediate_size,
        read_activation(fields, "hidden_act"),
    )
    return dense.with_layers(mlp=experts)


# Published checkpoints and transformers' own names differ in the block's name too.
FAMILY = Family(config, WeightMap(layer=routed("block_sparse_moe", "w1", "w3", "w2")))
