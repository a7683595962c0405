"""Reads a model folder's config.json into a checked, frozen `ModelConfig`.

What families share is read here. A family that means something else by a key has its own reader, made of
the same `Fields` getters, in the file named as its `model_type`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinfer.errors import ModelError
from jinfer.weights.files import read_json_object

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
DTYPES = ("float32", "bfloat16", "float16")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

_REQUIRED: Any = object()


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are stretched beyond the trained length. Fields that `rope_type` does not use are
    None.

    `original_max_position_embeddings` is the trained length in tokens; for `dynamic` it is the model's
    max_position_embeddings, beyond which the base grows.
    """

    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's architecture, in Hugging Face's words. Sizes are counts; head_dim is never left to be
    derived.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    hidden_act: str
    dtype: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    architectures: tuple[str, ...]


class Fields:
    """Typed getters over one JSON object. Each raises ModelError naming the file, the key and what was
    expected.

    A key that is absent or null gives `default`; without a default it is an error.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where

    def error(self, key: str, expected: str) -> ModelError:
        shown = repr(self.values.get(key))
        return ModelError(f"{self.where}: {key} is {shown[:120]}, expected {expected}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, *, low: int, high: int, default: Any = _REQUIRED) -> Any:
        value = self._value(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, *, low: float, high: float = 1e18, default: Any = _REQUIRED) -> Any:
        value = self._value(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, *, default: Any = _REQUIRED) -> Any:
        value = self._value(key, default)
        if value is not default and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def string(self, key: str, *, choices: Collection[str] = (), default: Any = _REQUIRED) -> Any:
        value = self._value(key, default)
        if value is default:
            return value
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.error(key, f"one of {', '.join(sorted(choices))}" if choices else "a string")
        return value

    def section(self, key: str) -> Fields | None:
        """The getters of an object inside this one; None if it is absent, null or empty."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return Fields(value, f"{self.where}: {key}") if value else None

    def integers(self, key: str, *, low: int, high: int) -> tuple[int, ...]:
        """One integer or a list of them, as a tuple; () if absent."""
        value = self.values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) or not low <= v <= high for v in found):
            raise self.error(key, f"an integer from {low} to {high} or a list of them")
        return tuple(found)

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ModelError(f"{self.where} lacks {key}")
        return default


def read_config(
    folder: Path, families: Mapping[str, Callable[[Fields], ModelConfig]] | None = None
) -> ModelConfig:
    """The config of a model folder.

    `families` maps each supported `model_type` to its reader; by default only Llama's. The end-of-sequence
    ids of generation_config.json are added to those of config.json. Raises ModelError naming file, key and
    value at fault.
    """
    readers = {"llama": common_config} if families is None else families
    fields = Fields(read_json_object(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    family = fields.string("model_type")
    if family not in readers:
        raise ModelError(
            f"{fields.where}: model_type is {family[:80]!r}, which jinfer does not support; "
            f"supported: {', '.join(sorted(readers))}"
        )
    if fields.values.get("quantization_config"):
        raise ModelError(
            f"{fields.where} has a quantization_config: quantized checkpoints are not supported, "
            "use the unquantized one"
        )
    config = readers[family](fields)
    if not (folder / GENERATION_FILE).is_file():
        return config
    generation = Fields(read_json_object(folder / GENERATION_FILE), str(folder / GENERATION_FILE))
    more = generation.integers("eos_token_id", low=0, high=config.vocab_size - 1)
    eos = tuple(dict.fromkeys(config.eos_token_ids + more))
    return dataclasses.replace(config, eos_token_ids=eos)


def common_config(fields: Fields) -> ModelConfig:
    """The config as Llama-like families write it; defaults are those of transformers' LlamaConfig."""
    heads = fields.integer("num_attention_heads", low=1, high=2**16)
    hidden = fields.integer("hidden_size", low=1, high=2**20)
    vocab = fields.integer("vocab_size", low=1, high=2**24)
    kv_heads = fields.integer("num_key_value_heads", low=1, high=heads, default=heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    length = fields.integer("max_position_embeddings", low=1, high=2**31 - 1, default=2048)
    theta, scaling = read_rope(fields, length)
    dtype = _dtype(fields)
    bos = fields.integers("bos_token_id", low=0, high=vocab - 1)
    return ModelConfig(
        model_type=fields.string("model_type"),
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", low=1, high=2**22),
        num_hidden_layers=fields.integer("num_hidden_layers", low=1, high=4096),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_head_dim(fields, hidden, heads),
        max_position_embeddings=length,
        rms_norm_eps=fields.number("rms_norm_eps", low=0.0, high=1.0, default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=fields.boolean("attention_bias", default=False),
        mlp_bias=fields.boolean("mlp_bias", default=False),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        hidden_act=fields.string("hidden_act", default="silu"),
        dtype=dtype,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(fields.integers("eos_token_id", low=0, high=vocab - 1))),
        architectures=_architectures(fields),
    )


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    head_dim = fields.integer("head_dim", low=2, high=2**14, default=None)
    if head_dim is None:
        if hidden % heads:
            raise fields.error(
                "hidden_size", f"a multiple of num_attention_heads ({heads}), as there is no head_dim"
            )
        head_dim = hidden // heads
    if head_dim % 2:
        raise ModelError(
            f"{fields.where}: the head size is {head_dim}, expected an even number: rotary embedding "
            "turns pairs"
        )
    return head_dim


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
    value = fields.values.get("architectures")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise fields.error("architectures", "a list of names")
    return tuple(value)


def read_rope(fields: Fields, max_position_embeddings: int) -> tuple[float, RopeScaling]:
    """Base and scaling of the rotary embedding, in either spelling.

    transformers 5 writes `rope_parameters` with rope_theta and rope_type inside; older ones write
    `rope_theta` beside `rope_scaling`, with the type under `rope_type` or `type`. Where both stand,
    `rope_scaling` goes first, and a rope_theta inside goes before one outside, as in transformers.
    """
    section = fields.section("rope_scaling") or fields.section("rope_parameters") or Fields({}, fields.where)
    source = section if section.has("rope_theta") else fields
    theta = source.number("rope_theta", low=1.0, high=1e15, default=10000.0)
    for holder in (section, fields):
        if holder.number("partial_rotary_factor", low=0.0, high=1.0, default=1.0) != 1.0:
            raise holder.error("partial_rotary_factor", "1.0: partly rotated heads are not supported")
    kind = section.string("rope_type" if section.has("rope_type") else "type", default="default")
    if kind not in ROPE_TYPES:
        raise ModelError(
            f"{section.where}: rope type {kind[:80]!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    if kind == "default":
        return theta, RopeScaling()
    if kind == "yarn" and not section.has("factor"):
        factor = max_position_embeddings / _original_length(fields, section, max_position_embeddings)
    else:
        factor = section.number("factor", low=1.0, high=1e6)
    if kind == "linear":
        return theta, RopeScaling(kind, factor)
    if kind == "dynamic":
        return theta, RopeScaling(kind, factor, max_position_embeddings)
    original = _original_length(fields, section, max_position_embeddings)
    if kind == "llama3":
        return theta, _llama3(section, factor, original)
    return theta, _yarn(section, factor, original)


def _original_length(fields: Fields, section: Fields, max_position_embeddings: int) -> int:
    # Some families write the trained length outside; transformers gives that one priority.
    key = "original_max_position_embeddings"
    source = fields if fields.has(key) else section
    return source.integer(key, low=1, high=2**31 - 1, default=max_position_embeddings)


def _llama3(section: Fields, factor: float, original: int) -> RopeScaling:
    low = section.number("low_freq_factor", low=1e-6, high=1e6)
    high = section.number("high_freq_factor", low=1e-6, high=1e6)
    if high <= low:
        raise section.error("high_freq_factor", f"more than low_freq_factor ({low:g})")
    return RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)


def _yarn(section: Fields, factor: float, original: int) -> RopeScaling:
    # transformers takes the standard betas for null and for 0 alike.
    fast = section.number("beta_fast", low=0.0, high=1e6, default=None) or 32.0
    slow = section.number("beta_slow", low=0.0, high=1e6, default=None) or 1.0
    if fast < slow:
        raise section.error("beta_fast", f"at least beta_slow ({slow:g})")
    return RopeScaling(
        "yarn",
        factor,
        original,
        attention_factor=section.number("attention_factor", low=0.0, high=1e6, default=None),
        beta_fast=fast,
        beta_slow=slow,
        mscale=section.number("mscale", low=0.0, high=1e6, default=None),
        mscale_all_dim=section.number("mscale_all_dim", low=0.0, high=1e6, default=None),
        truncate=section.boolean("truncate", default=True),
    )
