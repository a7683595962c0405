"""What an unsupported model would need: part of the error for an unknown `model_type`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinfer.errors import ModelError
from jinfer.layers.parameter import Build
from jinfer.models.checkpoint import HEAD, naming_of
from jinfer.models.config_keys import without_effect
from jinfer.models.decoder import ModelSpec
from jinfer.models.family import WRAPPERS
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config
from jinfer.models.text_part import SECTION
from jinfer.models.weight_map import WeightMap, is_buffer
from jinfer.weights.safetensors_source import open_safetensors

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
READ_ELSEWHERE = frozenset({"quantization_config", "is_encoder_decoder"})
SHOWN = 12


class Noting(Fields):
    """Fields that remember which key of the file, if one, was last refused."""

    at: str | None = None

    def error(self, key: str, expected: str) -> ModelError:
        self.at = key
        return super().error(key, expected)

    def section(self, key: str) -> Fields | None:
        self.at = key  # whatever is refused inside; `try_as_llama` asks only where something was
        return super().section(key)


def what_is_missing(folder: Path, fields: Fields) -> str:
    """Sentences, beginning with ". ", where the config is that of a plain decoder or of a model around a decoder;
    nothing for other models.
    """
    part = fields.values.get(SECTION)
    if isinstance(part, dict):
        name = str(part.get("model_type"))[:80]
        return f". Its {SECTION} is of model_type {name!r}; the text part is served of {', '.join(WRAPPERS)}"
    if fields.values.get("is_encoder_decoder") or any(not fields.has(key) for key in SIZES):
        return ""
    config, seen, refused = try_as_llama(fields)
    found = [f"config values that are refused: {'; '.join(refused)}"] if refused else []
    layers = ""
    if config is not None:
        layers = f" of {config.num_hidden_layers} layers"
        unread = {
            key for key in fields.values if key not in seen | READ_ELSEWHERE and not without_effect(key)
        }
        if any(rotary.dim != config.head_dim for rotary in config.rotaries):
            unread.add("partial_rotary_factor")
        found += [f"config keys that Llama has not: {_list(sorted(unread))}"] if unread else []
        found += _tensors_that_differ(folder, config)
    text = "; ".join(found) if found else "nothing that its files show, so it may be Llama under another name"
    return f". It is described like a decoder{layers}. Missing: {text}{_how(fields)}"


def try_as_llama(fields: Fields) -> tuple[ModelConfig | None, set[str], list[str]]:
    """(the config if the file were Llama's, keys that were read, what was refused).

    Each value that is refused is left out or replaced for another try. The config is None if that does not help.
    """
    values, seen, refused = dict(fields.values), set[str](), list[str]()
    tried: set[str | None] = set()
    while True:
        known = Noting(values, fields.where, seen)
        try:
            config = common_config(
                known, attention_bias="attention_bias", mlp_bias="mlp_bias", partial_rotary=1.0
            )
            return config, seen, refused
        except ModelError as error:
            problem = str(error).removeprefix(f"{fields.where}: ")
            if known.at in tried or problem in refused:
                return None, seen, list(dict.fromkeys([*refused, problem]))
            refused.append(problem)
            tried.add(known.at)
            values = _without(values, known.at)


def _without(values: Mapping[str, Any], key: str | None) -> dict[str, Any]:
    """The values of a config without the one that was refused."""
    if key == "hidden_size" and not values.get("head_dim"):  # it cannot be parted among the heads
        return {**values, "head_dim": 64}
    return {name: value for name, value in values.items() if name != key}


def _tensors_that_differ(folder: Path, config: ModelConfig) -> list[str]:
    present = _tensor_patterns(folder)
    if not present:
        return []
    wanted = {_pattern(name) for name in WeightMap().names(ModelSpec(config, Build(), scan=False))}
    if config.tie_word_embeddings:
        present -= {HEAD}
    more, fewer = sorted(present - wanted), sorted(wanted - present)
    found = [f"tensors that Llama has not: {_list(more)}"] if more else []
    return found + ([f"tensors of Llama's that it lacks: {_list(fewer)}"] if fewer else [])


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
        names = source.names()
        naming = naming_of(names)
        return {_pattern(naming.usual(name)) for name in names if not is_buffer(name)}
    finally:
        source.close()


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:80] for name in names[:SHOWN]) + more
