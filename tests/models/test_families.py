"""The families' config maps: every key that transformers knows is read or has no effect; what is not supported is
refused by name; files stay short."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from jinfer.errors import ModelError
from jinfer.layers.attention import AttentionSpec
from jinfer.models.family import MODEL_TYPES, family_of
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, read_config
from jinfer.models.unknown import WITHOUT_EFFECT

MODELS = Path(__file__).resolve().parents[2] / "jinfer" / "models"
FULL, SLIDING = "full_attention", "sliding_attention"
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
# transformers leaves it open, and no file does.
EXTRA = {"deepseek_v2": {"num_experts_per_tok": 2}}
# Read only where another key does not already decide, derived from others, or of no effect in this family.
OTHER: dict[str, set[str]] = {
    "deepseek_v2": {"n_group", "topk_group", "norm_topk_prob", "qk_head_dim"},
    "deepseek_v3": {"qk_head_dim", "num_nextn_predict_layers"},
    "gemma3_text": {"_sliding_window_pattern"},
    "phi3": {"original_max_position_embeddings"},
    "qwen2": {"sliding_window"},
    "qwen2_moe": {"sliding_window"},
    "qwen3": {"sliding_window"},
    "qwen3_moe": {"sliding_window"},
    "smollm3": {"no_rope_layer_interval", "sliding_window"},
}


def saved(model_type: str, **changes: Any) -> dict[str, Any]:
    """config.json as transformers writes it."""
    values = {**SMALL, **EXTRA.get(model_type, {}), **changes}
    return json.loads(AutoConfig.for_model(model_type, **values).to_json_string(use_diff=False))


def read(model_type: str, **changes: Any) -> ModelConfig:
    return family_of(model_type).config(Fields({**saved(model_type), **changes}, "config.json"))


def attention(config: ModelConfig) -> list[AttentionSpec]:
    specs = [layer.attention for layer in config.layers]
    assert all(isinstance(spec, AttentionSpec) for spec in specs)
    return specs  # type: ignore[return-value]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_key_of_transformers_is_read_or_has_no_effect(model_type):
    fields = Fields(saved(model_type), "config.json")
    family_of(model_type).config(fields)
    assert sorted(set(fields.values) - fields.seen - WITHOUT_EFFECT) == sorted(OTHER.get(model_type, set()))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_attention_to_later_tokens_is_refused(model_type):
    with pytest.raises(ModelError, match="is_causal is False, expected true"):
        read(model_type, is_causal=False)
    assert read(model_type, is_causal=True) == read(model_type)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_family_is_one_short_file(model_type):
    assert len((MODELS / f"{model_type}.py").read_text().splitlines()) < 150


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_published_configs_are_read(model_type):
    """With nothing but what transformers' own defaults say, as many files on the hub leave most keys out."""
    config = family_of(model_type).config(Fields(saved_defaults(model_type), "config.json"))
    theirs = AutoConfig.for_model(model_type)
    assert config.num_hidden_layers == theirs.num_hidden_layers
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.tie_word_embeddings == theirs.tie_word_embeddings


def saved_defaults(model_type: str) -> dict[str, Any]:
    """The sizes that every file states, and nothing else."""
    whole = AutoConfig.for_model(model_type).to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {"model_type": model_type, **EXTRA.get(model_type, {}), **{key: whole[key] for key in sizes}}


REFUSED = {
    "bidirectional": ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "bidirectional 2": (
        "gemma2",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention is True",
    ),
    "bidirectional 3": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "cap of attention": ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping is 5.0"),
    "partial rotary": ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "activation": ("llama", {"hidden_act": "snake"}, "hidden_act is 'snake', expected one of gelu"),
    "activation 2": ("gemma2", {"hidden_activation": "snake"}, "hidden_activation is 'snake'"),
    "no window": (
        "gemma2",
        {"sliding_window": None},
        "a layer is of type sliding_attention and sliding_window is null",
    ),
    "layer type": (
        "qwen3",
        {"layer_types": [FULL] * 3 + ["chunked_attention"]},
        "layer_types is .*, expected",
    ),
    "layer types": ("qwen2", {"layer_types": [FULL]}, "layer_types is .*, expected a list of 4"),
    "short no-rope": ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers is .* at least 4 entries"),
    "factors": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "short_factor is .* a list of 8 numbers",
    ),
    "odd rotation": ("phi", {"head_dim": 3, "partial_rotary_factor": 1.0}, "head .* expected an even number"),
    "quantized": ("qwen2", {"quantization_config": {"quant_method": "awq"}}, "quantized checkpoints are not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(case, tmp_path):
    model_type, changes, problem = REFUSED[case]
    config = saved(model_type)
    if "partial_rotary_factor" in changes:
        config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=problem):
        read_config(tmp_path)


def test_windows_of_qwen_begin_at_a_layer():
    used = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3, "layer_types": None}
    assert [spec.window for spec in attention(read("qwen2", **used))] == [None, None, None, 9]
    unused = {**used, "use_sliding_window": False}
    assert {spec.window for spec in attention(read("qwen2", **unused))} == {None}


def test_gemma_3_in_the_old_spelling():
    """Bases outside, a scaling for full layers only, a pattern in place of the layers' types."""
    old = {
        "rope_parameters": None,
        "layer_types": None,
        "sliding_window_pattern": 2,
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    found = attention(read("gemma3_text", **old))
    rotaries = [spec.rotary for spec in found]
    assert all(rotary is not None for rotary in rotaries)
    assert [(r.theta, r.kind, r.factor) for r in rotaries if r is not None] == [
        (2e3, "default", 1.0),
        (5e5, "linear", 8.0),
    ] * 2
    assert [spec.window for spec in found] == [4096, None] * 2


def test_old_names_of_longrope():
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    for name in ("su", "yarn", "longrope"):
        (rotary,) = read("phi3", rope_parameters=None, rope_scaling={"type": name, **factors}).rotaries
        assert (rotary.kind, rotary.original, rotary.long_factors) == ("longrope", 4096, (2.0,) * 8)


def test_first_gemma_releases_mean_the_tanh_approximation():
    (mlp,) = {layer.mlp for layer in read("gemma", hidden_act="gelu").layers}
    assert mlp.activation == "gelu_pytorch_tanh"  # type: ignore[attr-defined]


def test_layers_without_rotation():
    found = attention(read("smollm3", no_rope_layers=None, no_rope_layer_interval=2))
    assert [spec.rotary is None for spec in found] == [False, True, False, True]
