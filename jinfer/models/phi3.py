"""Phi 3 and 3.5: Llama with fused projections; longer contexts by longrope."""

from __future__ import annotations

from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config, read_window
from jinfer.models.weight_map import WeightMap, split_pair, split_qkv

DEFAULTS = {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
OLD_NAMES = ("su", "yarn")  # of longrope, in the family's first releases


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    values = dict(fields.values)
    for key in ("rope_scaling", "rope_parameters"):
        section = fields.section(key)
        if (
            section is not None
            and (section.values.get("rope_type") or section.values.get("type")) in OLD_NAMES
        ):
            values[key] = {**section.values, "rope_type": "longrope"}
    fields = fields.with_values(values)
    return common_config(fields, partial_rotary=1.0).with_attention(window=read_window(fields))


FAMILY = Family(
    config,
    WeightMap(
        layer={
            "attention.qkv.weight": split_qkv("self_attn.qkv_proj.weight"),
            "mlp.gate_up.weight": split_pair("mlp.gate_up_proj.weight"),
        }
    ),
)
