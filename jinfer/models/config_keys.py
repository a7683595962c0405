"""What config.json may hold that no reader asks for. Whatever is not listed here, and is not read, is refused: it might
change what the model computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinfer.errors import ModelError
from jinfer.models.fields import Fields

SHOWN = 5

# Reason, and the keys that are passed over for it, whatever their value.
PASSED_OVER: Mapping[str, frozenset[str]] = {
    "who wrote the file, and from what": frozenset(
        {
            "_commit_hash",
            "_name_or_path",
            "architectures",
            "auto_map",
            "custom_pipelines",
            "finetuning_task",
            "is_llama_config",
            "license",
            "model_name",
            "model_type",
            "name_or_path",
            "task_specific_params",
            "tokenizer_class",
            "transformers.js_config",
            "transformers_version",
            "unsloth_fixed",
            "unsloth_version",
        }
    ),
    "settings of training": frozenset(
        {
            "attention_dropout",
            "attention_probs_dropout_prob",
            "aux_loss_alpha",
            "embd_pdrop",
            "embedding_dropout",
            "gradient_checkpointing",
            "hidden_dropout",
            "hidden_dropout_prob",
            "initializer_range",
            "neftune_noise_alpha",
            "resid_pdrop",
            "residual_dropout",
            "router_aux_loss_coef",
            "router_jitter_noise",
            "router_z_loss_coef",
            "seq_aux",
        }
    ),
    "how transformers computes the same numbers, and what it returns": frozenset(
        {
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_attn_implementation_internal",
            "_experts_implementation",
            "_experts_implementation_internal",
            "_flash_attn_2_enabled",
            "attention_softmax_in_fp32",
            "attn_implementation",
            "cache_implementation",
            "chunk_size_feed_forward",
            "dtype",
            "ep_size",
            "experts_implementation",
            "is_decoder",
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "pretraining_tp",
            "return_dict",
            "scale_attention_softmax_in_fp32",
            "tf_legacy_loss",
            "tie_encoder_decoder",
            "tie_last_hidden_states",
            "torch_dtype",
            "torchscript",
            "use_bfloat16",
            "use_cache",
            "use_flash_attention",
            "use_flash_attn",
        }
    ),
    "labels and heads of classifiers, which are not served": frozenset(
        {
            "classifier_bias",
            "classifier_dropout",
            "id2label",
            "label2id",
            "num_labels",
            "problem_type",
        }
    ),
    "settings of generation, which are read from generation_config.json": frozenset(
        {
            "bad_words_ids",
            "begin_suppress_tokens",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            "length_penalty",
            "max_length",
            "max_new_tokens",
            "min_length",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "output_scores",
            "prefix",
            "remove_invalid_values",
            "repetition_penalty",
            "return_dict_in_generate",
            "suppress_tokens",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
        }
    ),
    "lengths that a trainer or a tokenizer works with; a model's is max_position_embeddings": frozenset(
        {
            "initial_context_length",
            "max_seq_len",
            "max_sequence_length",
            "model_max_length",
            "seq_length",
            "tokenizer_model_max_length",
            "tokenizer_padding_side",
        }
    ),
}
# A bias or a layer that is in the checkpoint and not in the model is refused there, and the other way round.
SHOWN_BY_TENSORS = frozenset(
    {
        "attention_bias",
        "attn_bias",
        "lm_head_bias",
        "mlp_bias",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "o_bias",
        "qkv_bias",
        "use_bias",
        "use_qkv_bias",
    }
)
# Read where the rope settings lack it, or ask for it.
READ_WITH_ROPE = frozenset({"original_max_position_embeddings", "partial_rotary_factor", "rope_theta"})
# Ids of single tokens beside those that are read: of padding, of images.
TOKEN_KEY = re.compile(r"\w+_token_(id|ids|index)")

# Keys that say at these values that something is off, or as it is in every family that does not ask for them.
OFF: Mapping[str, tuple[Any, ...]] = {
    "_remove_final_layer_norm": (False,),
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attn_output_gate": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "moe_layer_freq": (1,),
    "n_shared_experts": (0,),
    "norm_bias": (False,),
    "normalization_function": ("rmsnorm",),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "num_shared_experts": (0,),
    "parallel_attn": (False,),
    "position_embedding_type": ("rope",),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "scale_embedding": (False,),
    "shared_expert_intermediate_size": (0,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}
# The same for one family. ANY: passed over whatever the value.
ANY = object()
FAMILY: Mapping[str, Mapping[str, Any]] = {
    # Sizes that follow from others.
    "deepseek_v2": {"qk_head_dim": ANY},
    "deepseek_v3": {"qk_head_dim": ANY},
    # Older names beside those that are read.
    "gemma2": {"hidden_act": ANY, "sliding_window_size": ANY},
    "gemma3_text": {"hidden_act": ANY, "_sliding_window_pattern": ANY},
    "starcoder2": {"activation_function": ANY, "mlp_type": ("default",), "norm_type": ("layer_norm",)},
    # What the family always has.
    "qwen3": {"use_qk_norm": (True,)},
    "qwen3_moe": {"use_qk_norm": (True,), "max_window_layers": ANY},
    # Where windows begin is in layer_types or no_rope_layers.
    "smollm3": {"max_window_layers": ANY},
}
# In the outer part of a model of text and images: what is not about text.
OUTSIDE = frozenset(
    {
        "image_seq_length",
        "image_token_index",
        "mm_tokens_per_image",
        "multimodal_projector_bias",
        "projector_hidden_act",
        "spatial_merge_size",
        "text_config",
        "vision_config",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    }
)


def without_effect(key: str) -> bool:
    """True for keys that change no model's output, whatever their value."""
    return TOKEN_KEY.fullmatch(key) is not None or any(key in keys for keys in PASSED_OVER.values())


def refuse_unread(fields: Fields, model_type: str) -> None:
    """Refuses keys with a value that no reader of this file has asked for and that may change the output.

    Raises:
      ModelError: names them.
    """
    unread = [
        key
        for key, value in fields.values.items()
        if value is not None
        and key not in fields.seen
        and not without_effect(key)
        and key not in SHOWN_BY_TENSORS | READ_WITH_ROPE
        and not _is_off(fields, key, model_type)
    ]
    if not unread:
        return
    shown = ", ".join(f"{key[:60]!r} = {str(fields.values[key])[:40]}" for key in unread[:SHOWN])
    more = f" and {len(unread) - SHOWN} more" if len(unread) > SHOWN else ""
    raise ModelError(
        f"{fields.where} has {shown}{more}: not known for model_type {model_type[:80]!r}, so this may be another model, "
        "which would be computed wrongly. If it changes nothing that the model computes, delete it from config.json "
        "(of a hub model: in a downloaded copy)"
    )


def refuse_unread_outside(fields: Fields, model_type: str) -> None:
    """`refuse_unread` for the outer part of a model of text and images."""
    fields.idle(*OUTSIDE)
    refuse_unread(fields, model_type)


def _is_off(fields: Fields, key: str, model_type: str) -> bool:
    value = fields.values[key]
    allowed = FAMILY.get(model_type, {}).get(key, OFF.get(key, ()))
    if allowed is ANY:
        return True
    if key in ("sliding_window", "use_sliding_window", "layer_types") and "sliding_window" not in fields.seen:
        return _has_no_window(fields, key, value)
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def _has_no_window(fields: Fields, key: str, value: Any) -> bool:
    """True for a key about windows that asks for none, in a family that has none."""
    if key == "layer_types":
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    if key == "use_sliding_window":
        return value is False
    if fields.values.get("use_sliding_window") is False:
        return True
    length = fields.values.get("max_position_embeddings")
    if not isinstance(value, int) or not isinstance(length, int) or isinstance(value, bool):
        return False
    return value <= 0 or value >= length
