"""An unknown model_type: the error says what a new family would need."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from jinfer.errors import ModelError
from jinfer.models.hf_config import read_config
from tests.support.models import make_model

IDS = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}


def problem(folder) -> str:
    with pytest.raises(ModelError) as caught:
        read_config(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "config", "expected"),
    [
        (
            "olmo",
            {},
            "decoder of 2 layers. Missing: config keys that Llama has not: clip_qkv; tensors of Llama's that it "
            "lacks: model.layers.N.input_layernorm.weight, model.layers.N.post_attention_layernorm.weight, "
            "model.norm.weight. To add it, write jinfer/models/olmo.py",
        ),
        (
            "stablelm",
            {"use_qkv_bias": True},
            "config keys that Llama has not: layer_norm_eps, partial_rotary_factor, qk_layernorm, "
            "use_parallel_residual, use_qkv_bias; tensors that Llama has not: "
            "model.layers.N.input_layernorm.bias, model.layers.N.post_attention_layernorm.bias, "
            "model.layers.N.self_attn.k_proj.bias",
        ),
        (
            "cohere",
            IDS,
            "config keys that Llama has not: layer_norm_eps, logit_scale, use_qk_norm; tensors of",
        ),
    ],
)
def test_a_plain_decoder_is_told_what_it_lacks(model_type, config, expected, tmp_path):
    assert expected in problem(make_model(model_type, tmp_path, **config))


def test_without_weights_the_config_is_told(tmp_path):
    folder = make_model("olmo", tmp_path)
    (folder / "model.safetensors").unlink()
    text = problem(folder)
    assert "config keys that Llama has not: clip_qkv. To add it" in text


def test_llama_under_another_name(tmp_path):
    folder = make_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "../x y"}))
    text = problem(folder)
    assert "nothing that its files show, so it may be Llama under another name" in text
    assert "write jinfer/models/___x_y.py" in text


def test_all_that_is_refused_is_told_at_once(tmp_path):
    folder = make_model("olmo", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    wrong = {"hidden_act": "snake", "is_causal": False, "num_key_value_heads": 3, "rope_parameters": None}
    wrong["rope_scaling"] = {"rope_type": "magic"}
    (folder / "config.json").write_text(json.dumps({**config, **wrong}))
    text = problem(folder)
    assert re.search(
        "decoder of 2 layers. Missing: config values that are refused: is_causal is False, .*; num_key_value_heads is "
        "3, .*; rope_scaling: rope type 'magic' .*; hidden_act is 'snake', .*; config keys that Llama has not: "
        "clip_qkv; tensors of Llama's that it lacks: model.layers.N.input_layernorm.weight",
        text,
    )


def test_a_decoder_that_cannot_be_read_is_told_why(tmp_path):
    folder = make_model("olmo", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "snake", "vocab_size": -1}))
    assert "like a decoder. Missing: config values that are refused: vocab_size is -1, exp" in problem(folder)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        (
            "nemotron",
            "hidden_act is 'relu2', .*; config keys that Llama has not: norm_eps, partial_rotary_factor",
        ),
        ("bitnet", "hidden_act is 'relu2', .*swish. To add it"),
        ("arcee", "hidden_act is 'relu2', .*swish. To add it"),
        (
            "glm4_moe",
            "hidden_size is 4096, .*; config keys that Llama has not: first_k_dense_replace, moe_inter",
        ),
    ],
)
def test_what_transformers_has_and_jinfer_not(model_type, expected, tmp_path):
    (tmp_path / "config.json").write_text(AutoConfig.for_model(model_type).to_json_string(use_diff=False))
    assert re.search(f"Missing: config values that are refused: {expected}", problem(tmp_path))


def test_frequencies_and_other_prefixes_are_not_missing(tmp_path):
    folder = make_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    save_file(tensors, folder / "model.safetensors")
    assert "nothing that its files show" in problem(folder)


@pytest.mark.parametrize("config", [{"model_type": "mamba", "vocab_size": 5}, {"model_type": "bart"}])
def test_other_models_are_only_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "decoder" not in problem(tmp_path)
