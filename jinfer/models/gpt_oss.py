"""gpt-oss: experts with biases and a clamped activation, attention sinks, a window in every other layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jinfer.layers.moe import ClampedSwiGLU, MoESpec
from jinfer.models.family import Family
from jinfer.models.fields import Fields
from jinfer.models.hf_config import FULL, SLIDING, ModelConfig, common_config, read_layer_types, read_window
from jinfer.models.mixtral import read_router
from jinfer.models.weight_map import Recipe, Shape, Sources, WeightMap, plain
from jinfer.weights.mxfp4 import BLOCK, decode_mxfp4

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}


def config(fields: Fields) -> ModelConfig:
    fields = fields.with_defaults(DEFAULTS)
    if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
        fields = fields.with_defaults({"rope_scaling": ROPE})
    dense = common_config(fields, attention_bias="attention_bias", theta=150000.0)
    dense = dense.with_norm(wide=True).with_attention(sinks=True)
    depth = dense.num_hidden_layers
    types = read_layer_types(fields, depth) or [FULL if i % 2 else SLIDING for i in range(depth)]
    activation = ClampedSwiGLU(
        fields.number("swiglu_alpha", low=0.0), fields.number("swiglu_limit", low=1e-6)
    )
    router = read_router(fields, "num_local_experts", score="softmax_of_chosen", bias=True)
    fields.refuse("experts_per_token", router.top_k)
    experts = MoESpec(
        router,
        dense.intermediate_size,
        activation,
        bias=True,
    )
    return dense.with_windows(types, read_window(fields)).with_layers(mlp=experts)


def unweave(pairs: np.ndarray, shape: Shape) -> np.ndarray:
    """[X, 2 * F, ...], a gate and an up in turns, as [X, 2, F, ...]."""
    count, _, width, *rest = shape
    return pairs.reshape(count, width, 2, *rest).swapaxes(1, 2)


def flat_rows(shape: Shape) -> Shape:
    """The shape [X, F or 2 * F, ...] that a checkpoint has for [X, F, E] or for [X, 2, F, ...]."""
    return shape if len(shape) == 3 else (shape[0], 2 * shape[2], *shape[3:])


def experts(name: str) -> Recipe:
    """Inputs before outputs as bfloat16, or outputs before inputs as mxfp4, as [X, 2, F, E] or [X, E, F]."""

    def finish(rows: np.ndarray, shape: Shape) -> np.ndarray:
        return rows if len(shape) == 3 else unweave(rows, shape)

    def plain_sources(config: ModelConfig, shape: Shape) -> Sources:
        count, rows, inputs = flat_rows(shape)
        return ((name, (count, inputs, rows)),)

    def plain_build(config: ModelConfig, shape: Shape) -> Callable[[list[np.ndarray]], np.ndarray]:
        return lambda t: finish(t[0].swapaxes(1, 2), shape)

    def packed_sources(config: ModelConfig, shape: Shape) -> Sources:
        count, rows, inputs = flat_rows(shape)
        blocks = (count, rows, inputs // BLOCK)
        return ((f"{name}_blocks", (*blocks, BLOCK // 2)), (f"{name}_scales", blocks))

    def packed_build(config: ModelConfig, shape: Shape) -> Callable[[list[np.ndarray]], np.ndarray]:
        return lambda t: finish(decode_mxfp4(t[0], t[1]), shape)

    return Recipe(plain_sources, plain_build).or_else(Recipe(packed_sources, packed_build))


WEIGHTS = {
    "mlp.router.weight": plain("mlp.router.weight"),
    "mlp.router.bias": plain("mlp.router.bias"),
    "mlp.experts.gate_up": experts("mlp.experts.gate_up_proj"),
    "mlp.experts.gate_up_bias": Recipe(
        lambda config, shape: (("mlp.experts.gate_up_proj_bias", (shape[0], 2 * shape[2])),),
        lambda config, shape: lambda t: unweave(t[0], shape),
    ),
    "mlp.experts.down": experts("mlp.experts.down_proj"),
    "mlp.experts.down_bias": plain("mlp.experts.down_proj_bias"),
}
FAMILY = Family(config, WeightMap(layer=WEIGHTS), quantizations=("mxfp4",))
