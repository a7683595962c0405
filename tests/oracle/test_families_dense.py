"""Dense families against transformers: random weights, odd sizes, every option that a family has.

Each model is compared in logits per position and in greedy tokens of three prompts, in chunks of several pages, together
and with cached prefixes: of each family one configuration on one device, where each prompt runs alone too, one on two and
one on four devices.
"""

from dataclasses import replace
from typing import Any

import pytest

from tests.support.families import SETTINGS, check_family, settings_of


def rope(kind: str = "default", theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


def heads(count: int, kv: int, size: int, hidden: int = 48) -> dict[str, Any]:
    return {
        "num_attention_heads": count,
        "num_key_value_heads": kv,
        "head_dim": size,
        "hidden_size": hidden,
    }


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def longrope(pairs: int, original: int = 128) -> dict[str, Any]:
    """Factors that differ by dimension; the longest prompt is beyond the original length."""
    return {
        **rope(
            "longrope",
            short_factor=[1.0 + 0.05 * i for i in range(pairs)],
            long_factor=[1.5 + 0.7 * i for i in range(pairs)],
        ),
        "original_max_position_embeddings": original,
    }


END = {"eos_token_id": [2]}  # the default is beyond these vocabularies
CASES: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {**heads(4, 1, 10), **rope("llama3", 5e5, **LLAMA3), "scale": 0.2, "tie_word_embeddings": True},
        {**heads(4, 4, 12), "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        {**heads(8, 2, 8), **rope("yarn", factor=4.0, original_max_position_embeddings=64)},
    ],
    "mistral": [
        {**heads(4, 2, 16), "sliding_window": 23, "num_hidden_layers": 3},
        {**heads(8, 1, 10), "sliding_window": None, **rope(theta=1e6)},
        {
            **heads(4, 4, 14, 52),
            "sliding_window": 100,
            "vocab_size": 311,
            "scale": 0.2,
            "tie_word_embeddings": True,
        },
    ],
    "qwen2": [
        {"num_key_value_heads": 2, "scale": 0.2, "tie_word_embeddings": True, **rope(theta=1e6)},
        {
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
        },
        {"hidden_size": 56, **rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=128)},
    ],
    "qwen3": [
        {**heads(4, 2, 20), **rope(theta=1e6)},
        {**heads(4, 1, 16), "attention_bias": True, "scale": 0.2, "tie_word_embeddings": True},
        {
            **heads(8, 4, 6),
            "use_sliding_window": True,
            "sliding_window": 30,
            "layer_types": [SLIDING, FULL, SLIDING],
            "num_hidden_layers": 3,
        },
    ],
    "gemma": [
        {**heads(4, 1, 20), "tie_word_embeddings": True},
        {**heads(4, 4, 10), "hidden_act": "gelu", "attention_bias": True},
        {**heads(8, 2, 8, 40), "hidden_act": "relu", **rope("linear", factor=3.0)},
    ],
    "gemma2": [
        {**heads(4, 2, 16), "sliding_window": 21, "query_pre_attn_scalar": 24, "num_hidden_layers": 4},
        {
            **heads(4, 1, 12),
            "attention_bias": True,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
            "sliding_window": 40,
        },
        {
            **heads(8, 4, 8),
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": [FULL, SLIDING, SLIDING],
            "num_hidden_layers": 3,
            "sliding_window": 16,
        },
    ],
    "gemma3_text": [
        {**heads(4, 2, 12), "num_hidden_layers": 7, "sliding_window": 19, "sliding_window_pattern": 3},
        {
            **heads(4, 1, 16),
            "attention_bias": True,
            "final_logit_softcapping": 4.0,
            "query_pre_attn_scalar": 20,
            "tie_word_embeddings": True,
            "num_hidden_layers": 6,
            "sliding_window": 33,
        },
        {
            **heads(8, 4, 8),
            "layer_types": [FULL, SLIDING, FULL],
            "num_hidden_layers": 3,
            "sliding_window": 16,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                SLIDING: {"rope_type": "default", "rope_theta": 3e3},
            },
        },
    ],
    "phi3": [
        {"num_key_value_heads": 4, "sliding_window": 27},
        {"num_key_value_heads": 2, **longrope(6)},
        {"num_key_value_heads": 1, "partial_rotary_factor": 0.5, **longrope(3), "tie_word_embeddings": True},
    ],
    "phi": [
        {"num_key_value_heads": 4, "hidden_size": 64},
        {"num_key_value_heads": 2, "qk_layernorm": True, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
        {
            "num_key_value_heads": 1,
            "hidden_size": 80,
            **rope("linear", factor=2.0, partial_rotary_factor=0.4),
        },
    ],
    "olmo2": [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 2, "attention_bias": True, "num_attention_heads": 8, "hidden_size": 64},
        {"num_key_value_heads": 1, "tie_word_embeddings": True, **rope("linear", 5e5, factor=2.0)},
    ],
    "granite": [
        {
            "embedding_multiplier": 6.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
        },
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "attention_multiplier": 0.3},
        {"tie_word_embeddings": True, "embedding_multiplier": 2.0, "logits_scaling": 0.5, "hidden_size": 56},
    ],
    "smollm3": [
        {"num_hidden_layers": 5, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
        {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 1], "attention_bias": True, "mlp_bias": True},
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 25,
            "num_key_value_heads": 1,
        },
    ],
    "starcoder2": [
        {"num_key_value_heads": 2, "sliding_window": 31, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "use_bias": False, "norm_epsilon": 1e-3},
        {"num_key_value_heads": 4, "hidden_size": 56, "hidden_act": "silu", **rope(theta=1e6)},
    ],
    "glm4": [
        {**END, **heads(4, 2, 16), "attention_bias": True},
        {**END, **heads(8, 1, 10), "attention_bias": False, "scale": 0.2, "tie_word_embeddings": True},
        {**END, **heads(4, 4, 12), **rope(theta=5e3, partial_rotary_factor=1.0), "num_hidden_layers": 3},
    ],
}


def test_longrope_changes_while_a_sequence_grows(tmp_path):
    """A sequence that passes the original length is computed anew with the other factors, as transformers does."""
    settings = replace(SETTINGS, prompt_lengths=(40, 64, 30, 65), tensor_parallel_sizes=(1,))
    check_family("phi3", tmp_path, settings, num_key_value_heads=2, **longrope(6, original=64))


@pytest.mark.parametrize(
    ("family", "number"), [(f, i) for f, configs in CASES.items() for i in range(len(configs))]
)
def test_family_equals_transformers(family, number, tmp_path, pytestconfig):
    check_family(family, tmp_path, settings_of(number, pytestconfig), **CASES[family][number])
