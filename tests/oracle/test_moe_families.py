"""Families with mixtures of experts or latent attention against transformers, as `test_families_dense` does it.

Beside that: whole experts on each device, checkpoints with fused expert tensors, and experts packed as mxfp4.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoModelForCausalLM

from jinfer import ConfigError, ModelError, forward, load_params
from jinfer.weights.mxfp4 import BLOCK, decode_mxfp4
from tests.support.engines import greedy, run, small_engine
from tests.support.families import SETTINGS, check_family, clear_model, settings_of
from tests.support.models import hf_logits, make_model, random_prompt, relative_error


def rope(kind: str = "default", theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


def heads(count: int, kv: int, size: int | None, hidden: int = 48) -> dict[str, Any]:
    sizes = {"num_attention_heads": count, "num_key_value_heads": kv, "hidden_size": hidden}
    return sizes if size is None else {**sizes, "head_dim": size}


def latent(count: int, query: int | None, kept: int, nope: int, turned: int, value: int) -> dict[str, Any]:
    return {
        **heads(count, count, None),
        "q_lora_rank": query,
        "kv_lora_rank": kept,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": turned,
        "v_head_dim": value,
    }


def routed(count: int, chosen: int, width: int, key: str = "num_experts", **values: Any) -> dict[str, Any]:
    return {key: count, "num_experts_per_tok": chosen, "moe_intermediate_size": width, **values}


def deepseek(count: int, chosen: int, width: int, **values: Any) -> dict[str, Any]:
    return routed(count, chosen, width, "n_routed_experts", **values)


YARN = {"factor": 8.0, "original_max_position_embeddings": 64}
CASES: dict[str, list[dict[str, Any]]] = {
    "mixtral": [
        {**heads(4, 2, 16), "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 56},
        {**heads(4, 4, 10), "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 23},
        {
            **heads(8, 1, 12, 52),
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "tie_word_embeddings": True,
            "scale": 0.2,
            "num_hidden_layers": 3,
            **rope("linear", 1e6, factor=2.0),
        },
    ],
    "qwen2_moe": [
        {**heads(4, 2, None), **routed(6, 2, 28), "shared_expert_intermediate_size": 44},
        {
            **heads(4, 1, None),
            **routed(8, 3, 20, norm_topk_prob=True),
            "shared_expert_intermediate_size": 32,
            "num_hidden_layers": 4,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 19,
            "max_window_layers": 3,
        },
        {
            **heads(8, 4, None, 64),
            **routed(5, 4, 24),
            "shared_expert_intermediate_size": 21,
            "qkv_bias": False,
            "num_hidden_layers": 3,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
            "scale": 0.2,
        },
    ],
    "qwen3_moe": [
        {**heads(4, 2, 16), **routed(8, 3, 28, norm_topk_prob=True)},
        {
            **heads(8, 2, 10, 52),
            **routed(6, 2, 24),
            "attention_bias": True,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 29,
        },
        {
            **heads(4, 1, 24),
            **routed(4, 4, 20),
            "num_hidden_layers": 3,
            "mlp_only_layers": [0, 2],
            "tie_word_embeddings": True,
            "scale": 0.2,
            **rope("yarn", factor=4.0, original_max_position_embeddings=128),
        },
    ],
    "gpt_oss": [
        {**heads(4, 2, 16), "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 24},
        {
            **heads(8, 2, 10, 52),
            "num_local_experts": 4,
            "num_experts_per_tok": 4,
            "sliding_window": 70,
            "attention_bias": False,
            "swiglu_limit": 0.4,
            "num_hidden_layers": 3,
            **rope(),
        },
        {
            **heads(4, 4, 12),
            "num_local_experts": 6,
            "num_experts_per_tok": 1,
            "intermediate_size": 36,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "swiglu_alpha": 0.9,
            "tie_word_embeddings": True,
            "scale": 0.2,
        },
    ],
    "deepseek_v2": [
        {**latent(4, None, 24, 12, 8, 20), **deepseek(8, 3, 28), "first_k_dense_replace": 1},
        {
            **latent(4, 20, 16, 8, 12, 8),
            **deepseek(12, 4, 20, n_group=4, topk_group=2, topk_method="group_limited_greedy"),
            "routed_scaling_factor": 1.6,
            "n_shared_experts": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "first_k_dense_replace": 1,
            **rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.9),
        },
        {
            **latent(8, 28, 40, 6, 4, 10),
            **deepseek(5, 5, 24),
            "n_shared_experts": 3,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "scale": 0.2,
            **rope("yarn", 5e4, **YARN, mscale=0.707, mscale_all_dim=0.707),
        },
    ],
    "deepseek_v3": [
        {
            **latent(4, 28, 24, 12, 8, 20),
            **deepseek(8, 3, 28, n_group=4, topk_group=2),
            "first_k_dense_replace": 1,
        },
        {
            **latent(4, None, 16, 10, 12, 8),
            **deepseek(12, 4, 20, n_group=2, topk_group=1, norm_topk_prob=False),
            "n_shared_experts": 2,
            "rope_interleave": False,
            "attention_bias": True,
            "first_k_dense_replace": 0,
            **rope("yarn", **YARN, mscale=1.0, mscale_all_dim=1.0),
        },
        {
            **latent(8, 20, 32, 8, 6, 12),
            **deepseek(6, 2, 24, n_group=1, topk_group=1),
            "routed_scaling_factor": 0.8,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 2,
            "tie_word_embeddings": True,
            "scale": 0.2,
        },
    ],
}


@pytest.mark.parametrize(
    ("family", "number"), [(f, i) for f, configs in CASES.items() for i in range(len(configs))]
)
def test_family_equals_transformers(family, number, tmp_path, pytestconfig):
    check_family(family, tmp_path, settings_of(number, pytestconfig), **CASES[family][number])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_moe", {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
        ("gpt_oss", {"tensor_parallel_size": 4, "enable_expert_parallel": True}),
        ("deepseek_v3", {"tensor_parallel_size": 4, "enable_expert_parallel": True}),
        ("mixtral", {"expert_parallel_size": 4}),
        ("qwen3_moe", {"tensor_parallel_size": 2, "expert_parallel_size": 4}),
        ("deepseek_v2", {"tensor_parallel_size": 4, "expert_parallel_size": 2}),
    ],
)
def test_whole_experts_on_each_device(family, options, tmp_path):
    settings = dataclasses.replace(SETTINGS, prompt_lengths=(17, 60))
    folder, expected = clear_model(family, tmp_path, settings, **CASES[family][0])
    engine = small_engine(folder, **options, max_num_batched_tokens=64)
    experts = next(array for name, array in engine.runner.params.items() if "experts.down" in name)
    shares = options.get("expert_parallel_size") or options["tensor_parallel_size"]
    count = experts.ndim - 3  # before it a stack's layers, if there is one
    assert experts.sharding.shard_shape(experts.shape)[count] == experts.shape[count] // shares
    outputs = run(engine, {name: (one.prompt, greedy(48)) for name, one in expected.items()})
    for name, one in expected.items():
        assert outputs[name].token_ids == one.tokens


def test_whole_experts_that_cannot_be(tmp_path):
    dense = make_model("llama", tmp_path / "dense")
    with pytest.raises(ConfigError, match="the model has no experts"):
        load_params(str(dense), enable_expert_parallel=True)
    six = make_model("qwen2_moe", tmp_path / "six", **CASES["qwen2_moe"][0])
    with pytest.raises(ConfigError, match="the model has 6 experts"):
        load_params(str(six), enable_expert_parallel=True, tensor_parallel_size=4)
    with pytest.raises(ConfigError, match="expert_parallel_size is 4 and the model has 6 experts"):
        load_params(str(six), expert_parallel_size=4)
    with pytest.raises(ConfigError, match="leave one out"):
        load_params(str(six), expert_parallel_size=2, enable_expert_parallel=True)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 4, expert_parallel_size 3 and 8 cpu"):
        load_params(str(six), expert_parallel_size=3, tensor_parallel_size=4)


def saved_fused(folder: Path, into: Path) -> Path:
    """The same model with transformers' own names: one tensor for all experts of a layer."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(into, save_original_format=False)
    return into


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_fused_expert_tensors_load_to_the_same_parameters(family, loop, tmp_path):
    apart = make_model(family, tmp_path / "apart", **CASES[family][0])
    fused = saved_fused(apart, tmp_path / "fused")
    names = set(safetensors.numpy.load_file(fused / "model.safetensors"))
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    expected, actual = (load_params(str(folder), layer_loop=loop).arrays for folder in (apart, fused))
    assert expected.keys() == actual.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    folder = make_model("deepseek_v3", tmp_path, **CASES["deepseek_v3"][0])
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    extra = {
        name.replace("layers.1.", "layers.2."): array
        for name, array in tensors.items()
        if "layers.1." in name
    }
    extra["model.layers.2.eh_proj.weight"] = np.zeros((4, 4), np.float32)
    safetensors.numpy.save_file({**tensors, **extra}, folder / "model.safetensors")
    tokens = random_prompt(1, 20)
    actual = forward(load_params(str(folder)), jnp.asarray(tokens))
    assert relative_error(np.asarray(actual), hf_logits(folder, tokens)) < 1e-4


def pack_experts(folder: Path) -> None:
    """Replaces the experts of a gpt_oss folder by random mxfp4 blocks and scales, as published checkpoints have them."""
    random = np.random.default_rng(0)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        blocks = (count, outputs, inputs // BLOCK)
        tensors[f"{name}_blocks"] = random.integers(0, 256, (*blocks, BLOCK // 2), dtype=np.uint8)
        tensors[f"{name}_scales"] = random.integers(122, 125, blocks, dtype=np.uint8)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (folder / "config.json").write_text(json.dumps(config))


PACKED = {**heads(4, 2, 16, 64), "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_mxfp4_experts(tmp_path, loop):
    folder = make_model("gpt_oss", tmp_path, **PACKED)
    pack_experts(folder)
    tokens = random_prompt(3, 40)
    actual = jax.jit(forward)(load_params(str(folder), layer_loop=loop), jnp.asarray(tokens))
    assert relative_error(np.asarray(actual), hf_logits(folder, tokens)) < 1e-4


def test_mxfp4_numbers():
    """Codes 1 (0.5) and 15 (-6) in one byte, times 2^3; and what transformers reads from the same bytes."""
    byte = np.full((1, BLOCK // 2), 0xF1, np.uint8)
    np.testing.assert_array_equal(
        decode_mxfp4(byte, np.array([130], np.uint8)).astype(np.float32), np.tile([4.0, -48.0], 16)
    )
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (3, 6, 2, BLOCK // 2), dtype=np.uint8)
    scales = random.integers(100, 150, (3, 6, 2), dtype=np.uint8)
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    actual = decode_mxfp4(blocks, scales).astype(np.float32)
    np.testing.assert_array_equal(actual.swapaxes(1, 2), expected.float().numpy())


def test_nonsense_is_named(tmp_path):
    def refused(family: str, number: int, **changes: Any) -> str:
        folder = make_model(family, tmp_path / family, **CASES[family][number])
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ModelError) as error:
            load_params(str(folder))
        return str(error.value)

    assert "num_experts_per_tok is 9, expected an integer from 1 to 4" in refused(
        "mixtral", 0, num_experts_per_tok=9
    )
    assert "n_group is 3, expected a divisor of the 8 experts" in refused("deepseek_v3", 0, n_group=3)
    assert "topk_method is 'other', expected one of greedy" in refused("deepseek_v2", 0, topk_method="other")
    assert "quantization_config" in refused("mixtral", 0, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ValueError, match=r"expected uint8\[\.\.\., B, 16\]"):
        decode_mxfp4(np.zeros((2, 8), np.uint8), np.zeros(2, np.uint8))
