"""DeepSeek V2: latent attention, and mixtures of experts behind the first layers, with dense blocks beside them."""

from __future__ import annotations

import math
from dataclasses import replace

from jinfer.layers.mla import MLASpec
from jinfer.layers.mlp import MLPSpec
from jinfer.layers.moe import MoESpec, RouterSpec
from jinfer.layers.norm import NormSpec
from jinfer.layers.rope import Rotary
from jinfer.models.expert_weights import routed, shared
from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config, read_activation
from jinfer.models.mixtral import read_router
from jinfer.models.weight_map import Recipe, WeightMap, plain

DEFAULTS = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
}


def split_rows(name: str) -> Recipe:
    """[H * D, ...] as [H, D, ...]."""
    return Recipe(
        lambda config, shape: ((name, (shape[0] * shape[1], *shape[2:])),),
        lambda config, shape: lambda t: t[0].reshape(shape),
    )


WEIGHTS = {
    "attention.query_down.weight": plain("self_attn.q_a_proj.weight"),
    "attention.query_down.bias": plain("self_attn.q_a_proj.bias"),
    "attention.query_norm.weight": plain("self_attn.q_a_layernorm.weight"),
    "attention.query.weight": split_rows("self_attn.q_b_proj.weight").or_else(
        split_rows("self_attn.q_proj.weight")
    ),
    "attention.kv_down.weight": plain("self_attn.kv_a_proj_with_mqa.weight"),
    "attention.kv_down.bias": plain("self_attn.kv_a_proj_with_mqa.bias"),
    "attention.kv_norm.weight": plain("self_attn.kv_a_layernorm.weight"),
    "attention.kv_up": split_rows("self_attn.kv_b_proj.weight"),
    **routed(),
    **shared("mlp.shared_experts"),
}


def logit_scale(rotary: Rotary, head_dim: int) -> float:
    """Factor of the logits: with stretched angles, by the square of what the stretching multiplies magnitudes with."""
    if not rotary.mscale_all_dim or rotary.factor <= 1:
        return head_dim**-0.5
    magnitude = 0.1 * rotary.mscale_all_dim * math.log(rotary.factor) + 1.0
    return head_dim**-0.5 * magnitude * magnitude


def latent_config(fields: Fields, *, interleaved: bool, mlp_bias: str | bool = False) -> ModelConfig:
    """Latent attention in every layer, with dense blocks."""
    size = {
        key: fields.integer(key, low=1, high=2**20)
        for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    }
    rope, nope = size["qk_rope_head_dim"], size["qk_nope_head_dim"]
    # What files call head_dim, if they have it, is the rotated part's.
    partly = fields.with_values({**fields.values, "head_dim": rope})
    dense = common_config(partly, interleaved=interleaved, mlp_bias=mlp_bias)
    rotary = dense.rotaries[0]
    attention = MLASpec(
        num_heads=dense.num_attention_heads,
        latent=size["kv_lora_rank"],
        nope_dim=nope,
        value_dim=size["v_head_dim"],
        scale=logit_scale(rotary, nope + rope),
        rotary=rotary,
        norm=NormSpec(),
        query_latent=fields.integer("q_lora_rank", low=1, high=2**20, default=None),
        bias=fields.boolean("attention_bias", default=False),
    )
    kind = attention.kv_kind
    dense = replace(dense, num_key_value_heads=kind.num_kv_heads, head_dim=kind.head_dim)
    return dense.with_layers(attention=attention)


# transformers' names, which a file may have in place of the usual ones.
ALIASES = {"num_experts": "n_routed_experts"}


def with_experts(
    fields: Fields, dense: ModelConfig, router: RouterSpec, *, bias: bool = False
) -> ModelConfig:
    """The config with experts in all layers but the first ones. Raises ModelError for groups that do not fit."""
    each, left = divmod(router.num_experts, router.num_groups)
    if left or each < 2 <= router.num_groups or router.top_k > each * router.top_groups:
        raise fields.error(
            "n_group",
            f"a divisor of the {router.num_experts} experts, with {router.top_k} or more in "
            f"{router.top_groups} groups",
        )
    fields.refuse("moe_layer_freq", 1)
    width = fields.integer("moe_intermediate_size", low=1, high=2**22)
    count = fields.integer("n_shared_experts", low=1, high=4096)
    activation = read_activation(fields, "hidden_act")
    experts = MoESpec(router, width, activation, shared=MLPSpec(width * count, activation, bias=bias))
    first = fields.integer("first_k_dense_replace", low=0, high=4096)
    return dense.map_layers(lambda i, layer: layer if i < first else replace(layer, mlp=experts))


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_aliases(ALIASES).with_defaults(DEFAULTS)
    fields.refuse("scoring_func", "softmax")
    fields.refuse("norm_topk_prob", False)
    fields.refuse("rope_interleave", True)
    method = fields.string("topk_method", choices=("greedy", "group_limited_greedy"), default="greedy")
    groups = {}
    if method != "greedy":
        groups = {
            "num_groups": fields.integer("n_group", low=1, high=2**16),
            "top_groups": fields.integer("topk_group", low=1, high=2**16),
        }
    else:
        fields.idle("n_group", "topk_group")
    scale = fields.number("routed_scaling_factor", low=0.0, default=1.0)
    router = read_router(fields, "n_routed_experts", scale=scale, **groups)
    dense = latent_config(fields, interleaved=True, mlp_bias="mlp_bias")
    return with_experts(fields, dense, router, bias=fields.boolean("mlp_bias", default=False))


FAMILY = Family(config, WeightMap(layer=WEIGHTS))
