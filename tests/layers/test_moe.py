"""Routers and experts against transformers' own blocks, whole and parted over devices."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from jinfer.layers.mlp import MLPSpec
from jinfer.layers.moe import ClampedSwiGLU, MoESpec, RouterSpec, route
from jinfer.layers.parameter import Build
from jinfer.mesh import make_mesh, named_sharding

EMBED, WIDTH = 24, 20
V2: dict[str, Any] = {
    "num_attention_heads": 4,
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
}
V3: dict[str, Any] = {
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
}
GROUPED: dict[str, Any] = {"n_group": 4, "topk_group": 2}
SHARED = MLPSpec(2 * WIDTH)

# transformers' block, its config, and the spec that should compute the same.
CASES: dict[str, tuple[Any, Any, MoESpec]] = {
    "softmax_normalized": (
        MixtralSparseMoeBlock,
        MixtralConfig(hidden_size=EMBED, intermediate_size=WIDTH, num_local_experts=8, num_experts_per_tok=3),
        MoESpec(RouterSpec(8, 3, normalize=True), WIDTH),
    ),
    "shared_gate": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(
            hidden_size=EMBED,
            moe_intermediate_size=WIDTH,
            shared_expert_intermediate_size=28,
            num_experts=6,
            num_experts_per_tok=4,
        ),
        MoESpec(RouterSpec(6, 4), WIDTH, shared=MLPSpec(28), shared_gate=True),
    ),
    "all_experts_for_every_token": (
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig(hidden_size=EMBED, moe_intermediate_size=WIDTH, num_experts=4, num_experts_per_tok=4),
        MoESpec(RouterSpec(4, 4), WIDTH),
    ),
    "scaled": (
        DeepseekV2Moe,
        DeepseekV2Config(hidden_size=EMBED, routed_scaling_factor=1.7, **V2),
        MoESpec(RouterSpec(12, 3, scale=1.7), WIDTH, shared=SHARED),
    ),
    "best_expert_of_a_group": (
        DeepseekV2Moe,
        DeepseekV2Config(
            hidden_size=EMBED, topk_method="group_limited_greedy", n_group=3, topk_group=2, **V2
        ),
        MoESpec(RouterSpec(12, 3, num_groups=3, top_groups=2), WIDTH, shared=SHARED),
    ),
    "sigmoid_two_best_of_a_group": (
        DeepseekV3MoE,
        DeepseekV3Config(hidden_size=EMBED, routed_scaling_factor=2.5, **GROUPED, **V3),
        MoESpec(
            RouterSpec(
                16,
                4,
                "sigmoid",
                normalize=True,
                scale=2.5,
                correction=True,
                num_groups=4,
                top_groups=2,
                group_score="top2",
            ),
            WIDTH,
            shared=MLPSpec(WIDTH),
        ),
    ),
    "sigmoid_not_normalized": (
        DeepseekV3MoE,
        DeepseekV3Config(hidden_size=EMBED, norm_topk_prob=False, n_group=1, topk_group=1, **V3),
        MoESpec(RouterSpec(16, 4, "sigmoid", scale=2.5, correction=True), WIDTH, shared=MLPSpec(WIDTH)),
    ),
    "clamped": (
        GptOssMLP,
        GptOssConfig(
            hidden_size=EMBED,
            intermediate_size=WIDTH,
            num_local_experts=8,
            num_experts_per_tok=2,
            swiglu_limit=0.7,
            swiglu_alpha=1.3,
        ),
        MoESpec(RouterSpec(8, 2, "softmax_of_chosen", bias=True), WIDTH, ClampedSwiGLU(1.3, 0.7), bias=True),
    ),
}


def random_block(case: str) -> Any:
    block, config, _ = CASES[case]
    config._experts_implementation = "eager"
    made = block(config).eval()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in [*made.parameters(), *made.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.5)
    return made


def weights_of(block: Any, spec: MoESpec) -> dict[str, np.ndarray]:
    """transformers' tensors by the paths of jinfer's parameters."""
    found = {name: tensor.numpy() for name, tensor in block.state_dict().items()}
    count, width = spec.router.num_experts, spec.feed_forward
    router = "router" if spec.router.bias else "gate"
    result = {"router.weight": found[f"{router}.weight"]}
    gate_up, down = found["experts.gate_up_proj"], found["experts.down_proj"]
    if spec.bias:  # inputs first, gate and up in turns
        gate_up = gate_up.swapaxes(1, 2).reshape(count, width, 2, -1).swapaxes(1, 2)
        bias = found["experts.gate_up_proj_bias"].reshape(count, width, 2)
        result["experts.gate_up_bias"] = bias.swapaxes(1, 2)
        result["experts.down_bias"] = found["experts.down_proj_bias"]
        result["router.bias"] = found["router.bias"]
        down = down.swapaxes(1, 2)
    result["experts.gate_up"] = gate_up.reshape(count, 2, width, -1)
    result["experts.down"] = down
    if spec.router.correction:
        result["correction"] = found["gate.e_score_correction_bias"]
    if spec.shared:
        shared = "shared_expert" if spec.shared_gate else "shared_experts"
        parts = [found[f"{shared}.{part}_proj.weight"] for part in ("gate", "up")]
        result["shared.gate_up.weight"] = np.stack(parts)
        result["shared.down.weight"] = found[f"{shared}.down_proj.weight"]
    if spec.shared_gate:
        result["shared_gate.weight"] = found["shared_expert_gate.weight"]
    return result


def bound(spec: MoESpec, build: Build, weights: dict[str, np.ndarray], mesh: Any = None) -> Any:
    """(graph, state) of the block with these weights, sharded as declared if there is a mesh."""
    graph, state = nnx.split(spec.make(build, EMBED))
    flat = []
    for path, param in nnx.to_flat_state(state):
        array = jnp.asarray(weights[".".join(map(str, path))])
        assert array.shape == param.get_value().shape
        if mesh is not None:
            axes = param.get_metadata()["logical_axes"]
            array = jax.device_put(array, named_sharding(mesh, axes, array.shape))
        flat.append((path, param.replace(array)))
    assert len(flat) == len(weights)
    return graph, nnx.from_flat_state(flat)


def inputs(tokens: int) -> np.ndarray:
    return np.random.default_rng(tokens).normal(size=(tokens, EMBED)).astype(np.float32)


def expected_output(block: Any, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        y = block(torch.from_numpy(x)[None])
    return (y[0] if isinstance(y, tuple) else y)[0].numpy()


@jax.jit(static_argnums=0)
def run(graph, state, x, live=None):
    return nnx.merge(graph, state)(x, live)


@pytest.mark.parametrize("case", CASES)
def test_blocks_compute_what_transformers_computes(case):
    block, spec = random_block(case), CASES[case][2]
    graph, state = bound(spec, Build(), weights_of(block, spec))
    for tokens in (1, 37):
        x = inputs(tokens)
        np.testing.assert_allclose(run(graph, state, x), expected_output(block, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", ["shared_gate", "sigmoid_two_best_of_a_group", "clamped"])
@pytest.mark.parametrize(
    ("tensor", "expert", "over"), [(4, 1, False), (2, 1, True), (4, 1, True), (1, 2, False), (2, 4, False)]
)
def test_parted_over_devices(case, tensor, expert, over):
    """With 6 experts, 4 devices do not divide them: then every device has them all."""
    block, spec = random_block(case), CASES[case][2]
    build = Build(tensor_parallel=tensor, expert_parallel=expert, experts_over_tensor=over)
    mesh = make_mesh(tensor, expert=expert)
    graph, state = bound(spec, build, weights_of(block, spec), mesh)
    x = inputs(37)
    actual = run(graph, state, jax.device_put(x, NamedSharding(mesh, PartitionSpec())))
    np.testing.assert_allclose(actual, expected_output(block, x), rtol=2e-5, atol=2e-5)


def test_whole_experts_on_each_device_are_a_part_of_the_bytes():
    spec = CASES["clamped"][2]
    weights = weights_of(random_block("clamped"), spec)
    for build in (Build(tensor_parallel=4), Build(tensor_parallel=4, experts_over_tensor=True)):
        _, state = bound(spec, build, weights, make_mesh(4))
        for name in ("gate_up", "down"):
            array = state["experts"][name].get_value()
            assert array.addressable_shards[0].data.nbytes * 4 == array.nbytes


def test_padded_tokens_take_no_experts_rows():
    block, spec = random_block("clamped"), CASES["clamped"][2]
    graph, state = bound(spec, Build(), weights_of(block, spec))
    x = inputs(16)
    padded = np.concatenate([x, np.full((8, EMBED), np.nan, np.float32)])
    y = run(graph, state, padded, jnp.int32(16))
    np.testing.assert_allclose(y[:16], run(graph, state, x), rtol=1e-6, atol=1e-6)
    assert (y[16:] == 0).all()


def test_routing_is_for_each_token_alone():
    spec = CASES["sigmoid_two_best_of_a_group"][2].router
    random = np.random.default_rng(1)
    logits, correction = random.normal(size=(20, 16)).astype(np.float32), random.normal(size=16)
    weights, experts = route(jnp.asarray(logits), spec, jnp.asarray(correction, jnp.float32))
    one, expert = route(jnp.asarray(logits[7:8]), spec, jnp.asarray(correction, jnp.float32))
    np.testing.assert_array_equal(experts[7:8], expert)
    np.testing.assert_array_equal(weights[7:8], one)
    # Only experts of two groups of four, each once.
    for row in np.asarray(experts):
        assert len(set(row)) == 4
        assert len(set(row // 4)) <= 2


def test_gradients_reach_every_weight():
    block, spec = random_block("clamped"), CASES["clamped"][2]
    # Without the choice and the limit, whose edges have no slope.
    spec = replace(spec, router=replace(spec.router, top_k=8), activation=ClampedSwiGLU(1.3, 100.0))
    graph, state = bound(spec, Build(), weights_of(block, spec))
    x = inputs(9)

    def loss(state, x):
        return jnp.sum(nnx.merge(graph, state)(x) ** 2)

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, x)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))
    step = 1e-2 * np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    slope = (loss(state, x + step) - loss(state, x - step)) / 2
    np.testing.assert_allclose(np.sum(found[1] * step), slope, rtol=2e-2)
