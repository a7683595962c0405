"""Mutates config.json key by key and compares what jinfer makes of it with transformers.

`python -m tests.support.config_mutations [--family NAME,NAME] [--share 0.1] [--seed 0]` prints what disagrees. For every
family: each key that its config has, absent, null and with other values; each key that any family has, added; each
rope setting. A mutation passes where jinfer refuses it, or computes transformers' logits; where transformers itself
cannot read the file there is nothing to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from jinfer import forward, load_params
from jinfer.errors import JinferError
from jinfer.models.family import MODEL_TYPES
from jinfer.models.hf_config import ModelConfig, read_config
from tests.support.models import make_model, relative_error

FULL, SLIDING = "full_attention", "sliding_attention"
TOLERANCE = 1e-4
TOKENS = np.random.default_rng(5).integers(3, 60, 14).tolist()
ABSENT = object()
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
WINDOW: dict[str, Any] = {"sliding_window": 4}
SWITCHED: dict[str, Any] = {**WINDOW, "use_sliding_window": True}
WINDOWS: dict[str, Any] = {**SWITCHED, "max_window_layers": 1}
TYPES = {"layer_types": [SLIDING, FULL, SLIDING]}
CHOSEN = {"num_experts_per_tok": 2}
EXPERTS = {**CHOSEN, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    **EXPERTS,
}
# Small models in which every setting matters.
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT,
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 12, **WINDOW, **TYPES},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 12, **WINDOW, **TYPES},
    "glm4": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, **CHOSEN, **WINDOW, **TYPES},
    "granite": {"embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "llama": {"head_dim": 8},
    "mistral": {"head_dim": 8, **WINDOW},
    "mixtral": {"num_local_experts": 4, **CHOSEN, **WINDOW},
    "phi3": WINDOW,
    "qwen2": {**WINDOWS, **TYPES},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, **EXPERTS, **WINDOWS, **TYPES},
    "qwen3": {"head_dim": 8, **WINDOWS, **TYPES},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, **EXPERTS, **SWITCHED},
    "smollm3": {"no_rope_layers": [1, 0, 1], **SWITCHED, **TYPES},
    "starcoder2": WINDOW,
}
WRAPPED = {"gemma3": ("gemma3_text", "siglip_vision_model"), "mistral3": ("mistral", "pixtral")}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# transformers computes one pass with a window in every layer, whatever layer_types says, and cannot generate.
CONTRADICTED = {("mistral3", "layer_types")}
FACTORS = [1.0, 1.5, 2.0, 2.5]
ROPES: list[dict[str, Any]] = [
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": None},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
    {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 16,
        "beta_fast": 8,
        "beta_slow": 2,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.8},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1], "factor": 4.0},
    {
        "rope_type": "longrope",
        "short_factor": FACTORS,
        "long_factor": FACTORS[::-1],
        "original_max_position_embeddings": 8,
    },
    {"type": "su", "short_factor": FACTORS, "long_factor": FACTORS[::-1]},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "default", "rope_theta": 300.0, "factor": 3.0},
    {"rope_type": "default", "mrope_section": [1, 1, 2]},
    {"rope_type": "proportional", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0},
    {FULL: {"rope_type": "default", "rope_theta": 100.0}, SLIDING: {"rope_type": "linear", "factor": 2.0}},
    {FULL: {"rope_type": "default", "rope_theta": 100.0}, SLIDING: None},
]
# Keys that no default config has, and some reader may ask for.
MORE: dict[str, Any] = {
    "layer_types": [FULL, SLIDING, FULL],
    "rope_theta": 321.0,
    "rope_interleave": False,
    "rope_local_base_freq": 55.0,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 8,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "use_sliding_window": False,
    "max_window_layers": 1,
    "head_dim": 8,
    "hidden_act": "gelu",
    "hidden_activation": "gelu",
    "activation_function": "gelu",
    "is_causal": False,
    "is_decoder": True,
    "is_encoder_decoder": True,
    "add_cross_attention": True,
    "attention_bias": True,
    "qk_layernorm": True,
    "use_qk_norm": True,
    "logit_scale": 3.0,
    "scoring_func": "other",
    "moe_layer_freq": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "tie_word_embeddings": True,
    "per_layer_config": {"0": {"sliding_window": 2}},
    "pruned_heads": {"0": [1]},
    "rms_norm_eps": 0.1,
    "layer_norm_eps": 0.1,
    "norm_epsilon": 0.1,
    "some_new_key": 0.5,
    "clip_qkv": 0.1,
    "mlp_layer_types": ["dense", "sparse", "dense"],
    "num_nextn_predict_layers": 2,
}


@dataclass(frozen=True)
class Mutation:
    """One change of config.json: `path` to the key, and its new value (ABSENT takes it out)."""

    path: tuple[str, ...]
    value: Any

    def apply(self, config: dict[str, Any]) -> dict[str, Any]:
        changed = json.loads(json.dumps(config))
        at = changed
        for key in self.path[:-1]:
            at = at[key]
        if self.value is ABSENT:
            at.pop(self.path[-1], None)
        else:
            at[self.path[-1]] = self.value
        return changed

    def __str__(self) -> str:
        shown = "absent" if self.value is ABSENT else json.dumps(self.value)
        return f"{'.'.join(self.path)}: {shown}"


@dataclass(frozen=True)
class Outcome:
    """What a mutation led to: same, refused, no oracle, or wrong with what differs."""

    kind: str
    detail: str = ""


class Family:
    """A tiny random model of a family or wrapper, and its mutations."""

    def __init__(self, model_type: str, root: Path) -> None:
        self.model_type = model_type
        self.wrapped = model_type in WRAPPED
        self.folder = root / model_type
        if self.wrapped:
            make_wrapper(model_type, self.folder)
        else:
            make_model(model_type, self.folder, **{**SIZES, **MODELS.get(model_type, {})})
        file = self.folder / "config.json"
        config = json.loads(file.read_text())
        text = config["text_config"] if self.wrapped else config
        settings = {key: value for key, value in text.items() if key != "model_type"}
        full = AutoConfig.for_model(text["model_type"], **settings).to_json_string(use_diff=False)
        text.update({key: value for key, value in json.loads(full).items() if key not in text})
        self.config = config
        self.base = self._ours(config)
        logits = self._theirs(config)
        assert logits is not None, model_type
        self.logits = logits

    def mutations(self) -> list[Mutation]:
        prefix = ("text_config",) if self.wrapped else ()
        text = self.config["text_config"] if self.wrapped else self.config
        found: list[Mutation] = []
        for at, values in ((prefix, text), *([((), self.config)] if self.wrapped else [])):
            for key, value in values.items():
                if key in ("model_type", "architectures", "text_config", "vision_config"):
                    continue
                changes = [ABSENT, None, *others(key, value)]
                found += [Mutation((*at, key), change) for change in changes if change != value]
                if isinstance(value, dict):
                    for inner, setting in value.items():
                        found += [
                            Mutation((*at, key, inner), c) for c in (ABSENT, None, *others(inner, setting))
                        ]
            added = {**{key: value for key, value in MORE.items() if key not in values}}
            found += [Mutation((*at, key), value) for key, value in added.items()]
        found += [
            Mutation((*prefix, key), rope) for key in ("rope_parameters", "rope_scaling") for rope in ROPES
        ]
        return found

    def check(self, mutation: Mutation) -> Outcome:
        changed = mutation.apply(self.config)
        try:
            ours = self._ours(changed)
        except JinferError as error:
            return Outcome("refused", str(error))
        theirs = self._theirs(changed)
        if theirs is None:
            return Outcome("no oracle", "read by jinfer" if ours != self.base else "read as before")
        if replace(ours, **self._idle()) == replace(self.base, **self._idle()):
            off = relative_error(self.logits, theirs)
            return Outcome("same") if off < TOLERANCE else Outcome("wrong", f"not seen by jinfer, {off:.2g}")
        with self._folder(changed) as folder:
            try:
                actual = np.asarray(
                    jax.jit(forward)(load_params(str(folder), dtype="float32"), jnp.asarray(TOKENS))
                )
            except JinferError as error:
                return Outcome("refused", str(error))
        off = relative_error(actual, theirs)
        return Outcome("same") if off < TOLERANCE else Outcome("wrong", f"seen by jinfer, {off:.2g}")

    def _idle(self) -> dict[str, Any]:
        """What no logit depends on."""
        return {"bos_token_id": None, "eos_token_ids": (), "dtype": None, "architectures": ()}

    def _ours(self, config: dict[str, Any]) -> ModelConfig:
        with self._folder(config) as folder:
            return read_config(folder)

    def _theirs(self, config: dict[str, Any]) -> np.ndarray | None:
        kind: Any = AutoModelForImageTextToText if self.wrapped else AutoModelForCausalLM
        with self._folder(config) as folder:
            try:
                model, report = kind.from_pretrained(
                    folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
                )
                if report["missing_keys"] or report["mismatched_keys"]:
                    return None
                with torch.no_grad():
                    logits = model.eval()(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
            except Exception:  # transformers raises nearly every kind
                return None
        return logits if np.isfinite(logits).all() else None

    @contextlib.contextmanager
    def _folder(self, config: dict[str, Any]) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "model.safetensors").symlink_to(self.folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(config))
            yield folder


def others(key: str, value: Any) -> list[Any]:
    """Values that a key might have instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(1, value // 2), 0]
    if isinstance(value, float):
        return [value * 1.5 + 0.1]
    if isinstance(value, str):
        return (
            ["gelu", "relu"] if "act" in key else ["greedy", "other"] if key == "topk_method" else ["other"]
        )
    if isinstance(value, list):
        return [value[::-1], [], value[:1]]
    if value is None:
        return [True, 1, 0.5]
    return []


def make_wrapper(model_type: str, folder: Path) -> None:
    text, vision = WRAPPED[model_type]
    settings = {**SIZES, **MODELS[text], "model_type": text}
    config = AutoConfig.for_model(
        model_type,
        text_config=settings,
        vision_config={**VISION, "model_type": vision},
        **({"mm_tokens_per_image": 4} if model_type == "gemma3" else {}),
    )
    model: Any = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.12 * noise)
    model.save_pretrained(folder)


def run(names: list[str], share: float, seed: int) -> int:
    """Prints what is wrong, with counts of all outcomes. Returns how many are wrong."""
    chosen, wrong = random.Random(seed), 0
    root = Path(tempfile.mkdtemp())
    try:
        for name in names:
            family = Family(name, root)
            counts: dict[str, int] = {}
            for mutation in family.mutations():
                if chosen.random() >= share:
                    continue
                if (name, mutation.path[-1]) in CONTRADICTED:
                    continue
                outcome = family.check(mutation)
                counts[outcome.kind] = counts.get(outcome.kind, 0) + 1
                if outcome.kind == "wrong":
                    wrong += 1
                    print(f"{name}: {mutation}: {outcome.detail}", flush=True)
            print(name, counts, flush=True)
            jax.clear_caches()
    finally:
        shutil.rmtree(root)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default=",".join((*MODEL_TYPES, *WRAPPED)))
    parser.add_argument("--share", type=float, default=1.0, help="of the mutations, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    disable_progress_bar()
    return min(1, run(args.family.split(","), args.share, args.seed))


if __name__ == "__main__":
    raise SystemExit(main())
