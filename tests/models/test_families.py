"""The families' config maps: every key that transformers knows is read or has no effect; what is not supported is
refused by name; files stay short."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from jinfer.errors import ModelError
from jinfer.layers.attention import AttentionSpec
from jinfer.models.family import MODEL_TYPES, family_of
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, read_config

MODELS = Path(__file__).resolve().parents[2] / "jinfer" / "models"
PUBLISHED = Path(__file__).resolve().parents[2] / "configs" / "models"
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


def written(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_key_of_transformers_is_read_or_has_no_effect(model_type, tmp_path):
    assert read_config(written(tmp_path, saved(model_type))) == read(model_type)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_key_that_nobody_reads_is_refused(model_type, tmp_path):
    unknown = {"query_scale": 0.25, "per_layer_config": {"0": {"head_dim": 8}}}
    with pytest.raises(ModelError) as caught:
        read_config(written(tmp_path, {**saved(model_type), **unknown}))
    assert re.search(
        r"config.json has 'query_scale' = 0.25, 'per_layer_config' = .*: not known for model_type "
        rf"'{model_type}', .* delete it from config.json",
        str(caught.value),
    )
    nothing = dict.fromkeys(unknown) | {"image_token_id": 5, "unsloth_version": "2026.1"}
    assert read_config(written(tmp_path, {**saved(model_type), **nothing})) == read(model_type)


@pytest.mark.parametrize("folder", sorted(PUBLISHED.iterdir()), ids=lambda folder: folder.name)
def test_published_configs_have_no_key_that_nobody_reads(folder):
    assert read_config(folder).num_hidden_layers > 1


# Of published files: keys that transformers does not know, beside those of configs/models.
EXTRAS = [
    ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}),
    ("llama", {"max_sequence_length": 4096, "temperature": 0.9, "sliding_window": None, "pretraining_tp": 2}),
    ("llama", {"sliding_window": 4096, "use_sliding_window": False, "layer_types": [FULL] * 4}),
    ("mistral", {"unsloth_fixed": True, "_attn_implementation_autoset": True, "quantization_config": None}),
    ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}),
    ("qwen2", {"use_mrope": False, "sliding_window": 131072, "use_sliding_window": False}),
    ("qwen3_moe", {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}),
    ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "sliding_window_size": 9}),
    ("deepseek_v3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "ep_size": 1, "seq_aux": True}),
    ("starcoder2", {"norm_type": "layer_norm", "mlp_type": "default", "activation_function": "gelu"}),
    ("gpt_oss", {"experts_per_token": 4, "initial_context_length": 4096}),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "extra"), EXTRAS)
def test_keys_of_published_files_that_say_nothing(model_type, extra, tmp_path):
    assert read_config(written(tmp_path, {**saved(model_type), **extra})).model_type == model_type


UNKNOWN = [
    ("llama", {"sliding_window": 8}, "'sliding_window' = 8"),
    ("llama", {"layer_types": [FULL, SLIDING] * 2}, "'layer_types' = "),
    ("llama", {"use_mrope": True}, "'use_mrope' = True"),
    ("llama", {"is_encoder_decoder": True}, "'is_encoder_decoder' = True"),
    ("llama", {"num_experts": 8}, "'num_experts' = 8"),
    ("mistral", {"use_sliding_window": False}, "'use_sliding_window' = False"),
    ("qwen3", {"use_qk_norm": False, "attn_output_gate": True}, "'attn_output_gate' = True"),
    ("qwen3_moe", {"layer_types": [FULL, SLIDING] * 2}, "'layer_types' = "),
    ("gemma", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu', expected 'gelu_pytorch_tanh'"),
    ("gpt_oss", {"experts_per_token": 3}, "experts_per_token is 3, expected 4 or None"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', expected 'softmax'"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True, expected False"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax', expected 'sigmoid'"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy', expected 'noaux_tc'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "extra", "problem"), UNKNOWN)
def test_keys_of_other_models_are_refused(model_type, extra, problem, tmp_path):
    with pytest.raises(ModelError, match=problem):
        read_config(written(tmp_path, {**saved(model_type), **extra}))


@pytest.mark.parametrize(
    ("model_type", "name", "count"),
    [
        ("deepseek_v2", "num_experts", "n_routed_experts"),
        ("deepseek_v3", "num_local_experts", "n_routed_experts"),
        ("mixtral", "num_experts", "num_local_experts"),
        ("qwen3_moe", "num_local_experts", "num_experts"),
    ],
)
def test_other_names_of_a_key_go_before_it(model_type, name, count):
    others = {key: value for key, value in saved(model_type).items() if key not in (name, count)}
    config = family_of(model_type).config
    one, other = ({**others, **changes} for changes in ({name: 16, count: 8}, {count: 16}))
    assert config(Fields(one, "config.json")) == config(Fields(other, "config.json"))
    assert getattr(AutoConfig.for_model(model_type, **{count: 8, name: 16}), name) == 16


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


def test_layers_of_mistral_have_the_types_that_the_file_names():
    """transformers reads a mistral file with layer_types as its ministral."""
    types = [FULL, SLIDING, SLIDING, FULL]
    found = attention(read("mistral", layer_types=types, sliding_window=8))
    assert [spec.window for spec in found] == [None, 8, 8, None]
    assert {spec.window for spec in attention(read("mistral", layer_types=None, sliding_window=8))} == {8}


def test_a_null_flag_is_false():
    assert not read("deepseek_v3", rope_interleave=None).rotaries[0].interleaved
    (router,) = {layer.mlp.router for layer in read("deepseek_v3", norm_topk_prob=None).layers[3:]}  # type: ignore[union-attr]
    assert not router.normalize
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "truncate": None}
    assert not read("llama", rope_parameters=yarn).rotaries[0].truncate
