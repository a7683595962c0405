"""What an unsupported model would need: part of the error for an unknown `model_type`."""

from __future__ import annotations

import re
from pathlib import Path

from jinfer.errors import ModelError
from jinfer.layers.parameter import Build
from jinfer.models.decoder import ModelSpec
from jinfer.models.fields import Fields
from jinfer.models.hf_config import common_config
from jinfer.models.weight_map import WeightMap
from jinfer.weights.safetensors_source import open_safetensors

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Keys of config.json that say nothing about what a decoder computes for a prompt.
WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "dtype",
        "embd_pdrop",
        "embedding_dropout",
        "eos_token_id",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "residual_dropout",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
READ_ELSEWHERE = frozenset({"quantization_config"})
SHOWN = 12


def what_is_missing(folder: Path, fields: Fields) -> str:
    """Sentences, beginning with ". ", where the config is that of a plain decoder; nothing for other models."""
    if fields.values.get("is_encoder_decoder") or any(not fields.has(key) for key in SIZES):
        return ""
    known = Fields(fields.values, fields.where)
    try:
        config = common_config(
            known, attention_bias="attention_bias", mlp_bias="mlp_bias", partial_rotary=1.0
        )
    except ModelError as error:
        return f". It is described like a decoder, and this differs from Llama: {error}{_how(fields)}"
    unread = set(fields.values) - known.seen - WITHOUT_EFFECT - READ_ELSEWHERE
    if any(rotary.dim != config.head_dim for rotary in config.rotaries):
        unread.add("partial_rotary_factor")
    found = [f"config keys that Llama has not: {_list(sorted(unread))}"] if unread else []
    spec = ModelSpec(config, Build(), scan=False)
    wanted = {_pattern(name) for name in WeightMap().names(spec)}
    present = _tensor_patterns(folder)
    if present:
        if config.tie_word_embeddings:
            present -= {"lm_head.weight"}
        more, fewer = sorted(present - wanted), sorted(wanted - present)
        found += [f"tensors that Llama has not: {_list(more)}"] if more else []
        found += [f"tensors of Llama's that it lacks: {_list(fewer)}"] if fewer else []
    text = "; ".join(found) if found else "nothing that its files show, so it may be Llama under another name"
    return f". It is described like a decoder of {config.num_hidden_layers} layers. Missing: {text}{_how(fields)}"


def _how(fields: Fields) -> str:
    name = re.sub(r"\W", "_", str(fields.values.get("model_type")))[:40]
    return f". To add it, write jinfer/models/{name}.py: docs/adding-a-model.md shows how"


def _pattern(name: str) -> str:
    """A tensor's name with N in place of layer and expert numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


def _tensor_patterns(folder: Path) -> set[str]:
    try:
        source = open_safetensors(folder)
    except ModelError:  # no weights beside the config: what it needs of tensors cannot be told
        return set()
    try:
        return {_pattern(name) for name in source.names()}
    finally:
        source.close()


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:80] for name in names[:SHOWN]) + more
