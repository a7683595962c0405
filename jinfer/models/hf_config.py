"""Reads a model folder's config.json into a checked, frozen `ModelConfig`.

What families share is read here. A family's own reader, in the file named as its `model_type`, starts from
`common_config` and says what differs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jinfer.errors import ModelError
from jinfer.layers.attention import AttentionSpec, KVKind
from jinfer.layers.mlp import ACTIVATIONS, MLPSpec
from jinfer.layers.norm import NormSpec
from jinfer.layers.rope import Rotary
from jinfer.models.config_keys import refuse_unread, refuse_unread_outside
from jinfer.models.fields import Fields
from jinfer.models.layer import LayerSpec
from jinfer.models.rope_config import read_rotary
from jinfer.models.text_part import read_text_part
from jinfer.token_ids import read_token_ids
from jinfer.weights.files import read_json_object

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
ADAPTER_FILE = "adapter_config.json"
DTYPES = ("float32", "bfloat16", "float16")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's architecture. Sizes are counts, in Hugging Face's words; `layers` says what each layer does.

    embedding_multiplier: factor of the embeddings. logit_multiplier: factor of the logits, before logit_soft_cap, which
    makes them cap * tanh(logits / cap). head_bias: the head adds a bias. norm: the one after the last layer.
    has_head: without one there are hidden states and no logits. is_part: the checkpoint has other parts, for instance
    for images, which are not read.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    tie_word_embeddings: bool
    dtype: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    architectures: tuple[str, ...]
    embedding_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_soft_cap: float | None = None
    head_bias: bool = False
    has_head: bool = True
    is_part: bool = False

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """Every kind of rotary embedding that a layer uses."""
        found = [layer.attention.rotary for layer in self.layers]
        return tuple(dict.fromkeys(rotary for rotary in found if rotary is not None))

    @property
    def kv_kinds(self) -> dict[KVKind, tuple[int, ...]]:
        """The layers of each kind of KV pages, in order; kinds in the order of their first layers."""
        kinds: dict[KVKind, tuple[int, ...]] = {}
        for i, layer in enumerate(self.layers):
            kind = layer.attention.kv_kind
            kinds[kind] = (*kinds.get(kind, ()), i)
        return kinds

    @property
    def fixed_angles_length(self) -> int | None:
        """Sequences no longer than this have rotary angles that do not depend on their length; None: all have."""
        return min((rotary.original for rotary in self.rotaries if rotary.depends_on_length), default=None)

    @property
    def recompute_length(self) -> int | None:
        """A sequence that grows beyond it gets other rotary angles from its start on; None: none does."""
        return min((rotary.original for rotary in self.rotaries if rotary.kind == "longrope"), default=None)

    def map_layers(self, change: Callable[[int, LayerSpec], LayerSpec]) -> ModelConfig:
        """This config with layer i replaced by change(i, layer i)."""
        return dataclasses.replace(self, layers=tuple(change(i, spec) for i, spec in enumerate(self.layers)))

    def with_layers(self, **changes: Any) -> ModelConfig:
        """This config with these fields of every layer."""
        return self.map_layers(lambda i, layer: dataclasses.replace(layer, **changes))

    def with_norm(self, **changes: Any) -> ModelConfig:
        """This config with these fields of every norm, the last one's too."""
        norm = dataclasses.replace(self.norm, **changes)
        return dataclasses.replace(self.with_layers(norm=norm), norm=norm)

    def with_windows(self, types: Sequence[str], window: int | None) -> ModelConfig:
        """This config with the window in those layers whose type is "sliding_attention", in no other.

        Raises:
          ModelError: such a layer, and no window.
        """
        if SLIDING in types and window is None:
            raise ModelError("config.json: a layer is of type sliding_attention and sliding_window is null")
        return self.map_layers(
            lambda i, layer: with_attention(layer, window=window if types[i] == SLIDING else None)
        )

    def with_attention(self, **changes: Any) -> ModelConfig:
        """This config with these fields of every layer's attention."""
        return self.map_layers(lambda i, layer: with_attention(layer, **changes))


def with_attention(layer: LayerSpec, **changes: Any) -> LayerSpec:
    """The layer with these fields of its grouped-query attention."""
    attention = dataclasses.replace(cast(AttentionSpec, layer.attention), **changes)
    return dataclasses.replace(layer, attention=attention)


def read_config(
    folder: Path, families: Mapping[str, Callable[[Fields], ModelConfig]] | None = None
) -> ModelConfig:
    """The config of a model folder.

    `families` maps each `model_type` to its reader; by default every family that jinfer has. The end-of-sequence
    ids of generation_config.json are added to those of config.json.

    Raises:
      ModelError: names file, key and value at fault; for an unknown model_type, what a new family would need.
    """
    from jinfer.models.family import MODEL_TYPES, WRAPPERS, family_of
    from jinfer.models.unknown import what_is_missing

    _refuse_adapter(folder)
    fields = Fields(read_json_object(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    whole = fields.string("model_type")
    is_part = families is None and whole in WRAPPERS
    if is_part:
        outer, fields = fields, read_text_part(fields)
        refuse_unread_outside(outer, whole)
    model_type = fields.string("model_type")
    supported = MODEL_TYPES if families is None else tuple(families)
    if model_type not in supported:
        raise ModelError(
            f"{fields.where}: model_type is {model_type[:80]!r}, which jinfer does not support; "
            f"supported: {', '.join(sorted(supported))}{what_is_missing(folder, fields)}"
        )
    readable: tuple[str, ...] = ()
    if families is None:
        family = family_of(model_type)
        reader, readable = family.config, family.quantizations
    else:
        reader = families[model_type]
    _check_quantization(fields, readable)
    config = reader(fields)
    refuse_unread(fields, model_type)
    if is_part:
        logger.warning("%s: of this %s model the text part is served, and no images", fields.where, whole)
        config = dataclasses.replace(config, is_part=True)
    if not (folder / GENERATION_FILE).is_file():
        return config
    generation = Fields(read_json_object(folder / GENERATION_FILE), str(folder / GENERATION_FILE))
    more = read_ids(generation, "eos_token_id", config.vocab_size)
    eos = tuple(dict.fromkeys(config.eos_token_ids + more))
    return dataclasses.replace(config, eos_token_ids=eos)


def _refuse_adapter(folder: Path) -> None:
    """Adapters are not applied, and a model without its own is another one."""
    if not (folder / ADAPTER_FILE).is_file():
        return
    base = read_json_object(folder / ADAPTER_FILE).get("base_model_name_or_path")
    found = f"{folder} has {ADAPTER_FILE}: an adapter of {str(base)[:200]!r}"
    merge = "merge it into the model (peft's merge_and_unload, then save_pretrained) and give that folder"
    if (folder / CONFIG_FILE).is_file():
        raise ModelError(
            f"{found} beside a model, which jinfer does not apply: {merge}, or take the file away"
        )
    raise ModelError(f"{found}, expected a whole model: {merge}")


def _check_quantization(fields: Fields, readable: tuple[str, ...]) -> None:
    for key in ("quantization_config", "quantization"):
        section = fields.section(key)
        if (
            section is None
            or _is_switched_off(section)
            or section.string("quant_method", default="") in readable
        ):
            continue
        raise ModelError(
            f"{fields.where} has a {key}: quantized checkpoints are not supported, use the unquantized one"
        )


def _is_switched_off(section: Fields) -> bool:
    """True for the settings of a quantization at load that was not done, as bitsandbytes leaves them behind."""
    if section.string("quant_method", default="bitsandbytes") != "bitsandbytes":
        return False
    switches = [value for key, value in section.values.items() if key.lstrip("_").startswith("load_in_")]
    return bool(switches) and not any(switches)


def common_config(
    fields: Fields,
    *,
    eps: str = "rms_norm_eps",
    activation: str = "hidden_act",
    attention_bias: str | bool = False,
    mlp_bias: str | bool = False,
    gated: bool = True,
    theta: float = 10000.0,
    partial_rotary: float | None = None,
    interleaved: bool = False,
) -> ModelConfig:
    """A decoder as Llama has it, of the sizes that the file states: RMS norms before each block, rotary embedding,
    grouped-query attention over everything before, a gated feed-forward block.

    eps, activation: the keys under which this family keeps them. attention_bias, mlp_bias: a key, or whether all of
    this family have biases. gated: of the feed-forward block. theta, partial_rotary, interleaved: see `read_rotary`.
    """
    fields.seen.add("is_causal")
    if fields.values.get("is_causal", True) is not True:  # transformers takes a null for false
        raise fields.error("is_causal", "true: attention to later tokens is not supported")
    heads = fields.integer("num_attention_heads", low=1, high=2**16)
    hidden = fields.integer("hidden_size", low=1, high=2**20)
    vocab = fields.integer("vocab_size", low=1, high=2**24)
    kv_heads = fields.integer("num_key_value_heads", low=1, high=heads, default=heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = read_head_dim(fields, hidden, heads)
    length = fields.integer(
        "max_position_embeddings",
        low=1,
        high=2**31 - 1,
        default=fields.defaults.get("max_position_embeddings", 2048),
    )
    rotary = read_rotary(
        fields, head_dim, length, theta=theta, partial=partial_rotary, interleaved=interleaved
    )
    norm = NormSpec(eps=fields.number(eps, low=0.0, high=1.0, default=fields.defaults.get(eps, 1e-6)))
    bias = _flag(fields, attention_bias)
    attention = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, rotary, qkv_bias=bias, out_bias=bias)
    width = fields.integer("intermediate_size", low=1, high=2**22)
    mlp = MLPSpec(width, read_activation(fields, activation), gated, bias=_flag(fields, mlp_bias))
    bos = read_ids(fields, "bos_token_id", vocab)
    depth = fields.integer("num_hidden_layers", low=1, high=4096)
    return ModelConfig(
        model_type=fields.string("model_type"),
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=length,
        layers=(LayerSpec(attention, mlp, norm),) * depth,
        norm=norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        dtype=_dtype(fields),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=read_ids(fields, "eos_token_id", vocab),
        architectures=_architectures(fields),
    )


def read_ids(fields: Fields, key: str, vocab: int) -> tuple[int, ...]:
    """Token ids, as `read_token_ids` reads them."""
    fields.seen.add(key)
    return read_token_ids(fields.values.get(key), vocab, fields.where, key)


def read_window(fields: Fields, key: str = "sliding_window") -> int | None:
    """Tokens that a query sees, its own included; None for all of them."""
    return fields.integer(key, low=1, high=2**31 - 1, default=None)


def read_switched_window(fields: Fields) -> int | None:
    """As `read_window`, None too where use_sliding_window is off or absent."""
    if fields.boolean("use_sliding_window", default=False):
        return read_window(fields)
    fields.idle("sliding_window")
    return None


def read_layer_types(fields: Fields, depth: int) -> tuple[str, ...] | None:
    """ "full_attention" or "sliding_attention" per layer; None if the file leaves it to the family."""
    return fields.strings("layer_types", choices=(FULL, SLIDING), count=depth)


def read_activation(fields: Fields, key: str) -> str:
    """An activation's name. Raises ModelError for one that `ACTIVATIONS` does not have."""
    return fields.string(key, choices=ACTIVATIONS, default=fields.defaults.get(key, "silu"))


def read_head_dim(fields: Fields, hidden: int, heads: int) -> int:
    """The size of a head: as stated, else the hidden size divided by the number of heads."""
    head_dim = fields.integer("head_dim", low=2, high=2**14, default=None)
    if head_dim is None:
        if hidden % heads:
            raise fields.error(
                "hidden_size", f"a multiple of num_attention_heads ({heads}), as there is no head_dim"
            )
        head_dim = hidden // heads
    return head_dim


def _flag(fields: Fields, key: str | bool) -> bool:
    return key if isinstance(key, bool) else fields.boolean(key, default=False)


def _dtype(fields: Fields) -> str | None:
    """transformers 5 writes `dtype`, older ones `torch_dtype`."""
    key = "dtype" if fields.has("dtype") else "torch_dtype"
    value = fields.string(key, default=None)
    if value is None:
        return None
    name = value.removeprefix("torch.")
    if name not in DTYPES:
        raise fields.error(key, f"one of {', '.join(DTYPES)}")
    return name


def _architectures(fields: Fields) -> tuple[str, ...]:
    fields.seen.add("architectures")
    value = fields.values.get("architectures")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise fields.error("architectures", "a list of names")
    return tuple(value)
