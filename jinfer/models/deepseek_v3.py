"""DeepSeek V3: V2 with a sigmoid router whose choice a learned bias corrects, and which groups of experts limit."""

from __future__ import annotations

from jinfer.models import deepseek_v2
from jinfer.models.deepseek_v2 import latent_config, with_experts
from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig
from jinfer.models.mixtral import read_router
from jinfer.models.weight_map import WeightMap, plain

DEFAULTS = {
    **deepseek_v2.DEFAULTS,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
}
WEIGHTS = {**deepseek_v2.WEIGHTS, "mlp.correction": plain("mlp.gate.e_score_correction_bias")}


ALIASES = {"num_local_experts": "n_routed_experts"}


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_aliases(ALIASES).with_defaults(DEFAULTS)
    fields.refuse("scoring_func", "sigmoid")
    fields.refuse("topk_method", "noaux_tc")
    router = read_router(
        fields,
        "n_routed_experts",
        score="sigmoid",
        normalize=fields.boolean("norm_topk_prob"),
        scale=fields.number("routed_scaling_factor", low=0.0),
        correction=True,
        num_groups=fields.integer("n_group", low=1, high=2**16),
        top_groups=fields.integer("topk_group", low=1, high=2**16),
        group_score="top2",
    )
    interleaved = fields.boolean("rope_interleave", default=True)
    return with_experts(fields, latent_config(fields, interleaved=interleaved), router)


# Published checkpoints have one more layer, which predicts a second token ahead.
FAMILY = Family(config, WeightMap(layer=WEIGHTS, ignores_more_layers=True))
