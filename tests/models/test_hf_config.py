"""config.json: what real models write is read as transformers reads it, and nonsense is named."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Starcoder2Config

from jinfer.errors import ModelError
from jinfer.layers.attention import AttentionSpec
from jinfer.layers.mlp import MLPSpec
from jinfer.layers.rope import Rotary
from jinfer.models.fields import Fields
from jinfer.models.hf_config import ModelConfig, common_config, read_config

SMALL = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3 = LLAMA_2 | {
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_31 = LLAMA_3 | {
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": LLAMA_3_SCALING,
}
LLAMA_32 = LLAMA_31 | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_3_SCALING | {"factor": 32.0},
    "tie_word_embeddings": True,
}
NEW_SPELLING = {
    k: v for k, v in LLAMA_31.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")
} | {
    "dtype": "bfloat16",
    "rope_parameters": LLAMA_3_SCALING | {"rope_theta": 500000.0},
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
REAL = {
    "least": SMALL,
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3,
    "llama 3.1": LLAMA_31,
    "llama 3.2": LLAMA_32,
    "llama 3.1, new spelling": NEW_SPELLING,
    "linear, old type key": LLAMA_2 | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": LLAMA_2 | {"rope_scaling": {"rope_type": "dynamic", "factor": 4}},
    "yarn": LLAMA_2 | {"rope_scaling": YARN | {"beta_fast": 16.0, "attention_factor": 1.25}},
    "yarn, length left out": LLAMA_2 | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "yarn, length outside": LLAMA_2 | {"rope_scaling": YARN, "original_max_position_embeddings": 2048},
    "yarn, deepseek's": LLAMA_2
    | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.5, "truncate": False, "beta_slow": None}},
    "default with theta inside": SMALL | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "theta inside and outside": SMALL | {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}},
    "both spellings": SMALL
    | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
    "empty scaling": SMALL | {"rope_scaling": {}, "rope_theta": 300.0},
    "grouped, biased, explicit head": SMALL
    | {"num_key_value_heads": 2, "head_dim": 20, "attention_bias": True, "mlp_bias": True},
    "nulls": SMALL
    | {"num_key_value_heads": None, "head_dim": None, "eos_token_id": None, "bos_token_id": None},
}


def write(folder: Path, config: Any, generation: Any = None) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def parts(config: ModelConfig) -> tuple[AttentionSpec, MLPSpec]:
    """What all layers of a uniform model are."""
    assert set(config.layers) == {config.layers[0]}
    attention, mlp = config.layers[0].attention, config.layers[0].mlp
    assert isinstance(attention, AttentionSpec)
    assert isinstance(mlp, MLPSpec)
    return attention, mlp


def check_equal(ours: ModelConfig, theirs: LlamaConfig) -> None:
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "head_dim", "max_position_embeddings")
    same += ("tie_word_embeddings", "bos_token_id")
    for name in same:
        assert getattr(ours, name) == getattr(theirs, name), name
    attention, mlp = parts(ours)
    assert ours.norm.eps == ours.layers[0].norm.eps == theirs.rms_norm_eps
    assert attention.qkv_bias == attention.out_bias == theirs.attention_bias
    assert (mlp.bias, mlp.activation, mlp.feed_forward) == (
        theirs.mlp_bias,
        theirs.hidden_act,
        theirs.intermediate_size,
    )
    eos = theirs.eos_token_id
    assert list(ours.eos_token_ids) == (eos if isinstance(eos, list) else [] if eos is None else [eos])
    assert ours.dtype == (None if theirs.dtype is None else str(theirs.dtype).removeprefix("torch."))
    theirs.standardize_rope_params()  # as transformers does again where it computes the angles
    rope: dict[str, Any] = dict(theirs.rope_parameters or {})  # type: ignore
    rope.pop("type", None)
    # What the file leaves open, transformers fills in where it computes the angles.
    rope = {name: value for name, value in rope.items() if value is not None}
    if rope["rope_type"] == "dynamic":
        rope["original_max_position_embeddings"] = theirs.max_position_embeddings
    names = {"rope_theta": "theta", "rope_type": "kind", "original_max_position_embeddings": "original"}
    told = {names.get(name, name): value for name, value in rope.items()}
    assert attention.rotary == Rotary(attention.head_dim, **told)


@pytest.mark.parametrize("name", REAL)
def test_reads_as_transformers_does(name, tmp_path):
    config = REAL[name]
    # Absent ids default to 1 and 2 in transformers; a file without them says nothing here.
    ids = {"bos_token_id": None, "eos_token_id": None}
    check_equal(read_config(write(tmp_path, config)), LlamaConfig(**copy.deepcopy(ids | config)))


@pytest.mark.parametrize(
    "name", ["llama 3.2", "yarn", "linear, old type key", "grouped, biased, explicit head"]
)
def test_reads_what_transformers_saves(name, tmp_path):
    theirs = LlamaConfig(**copy.deepcopy(REAL[name]))
    theirs.save_pretrained(tmp_path)
    check_equal(read_config(tmp_path), theirs)


def test_absent_yarn_factor_is_the_ratio_of_lengths(tmp_path):
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 1024}
    config = read_config(write(tmp_path, LLAMA_2 | {"rope_scaling": scaling}))
    assert config.rotaries[0].factor == 4.0


def test_yarn_defaults():
    config = common_config(Fields(LLAMA_2 | {"rope_scaling": YARN}, "x"))
    expected = Rotary(128, 10000.0, "yarn", factor=4.0, original=1024, beta_fast=32.0, beta_slow=1.0)
    assert config.rotaries == (expected,)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, (2,)),
        (2, {"eos_token_id": [3, 2, 5]}, (2, 3, 5)),
        ([4, 2, 4], {"eos_token_id": 7}, (4, 2, 7)),
        (None, {"eos_token_id": 7}, (7,)),
        (None, {}, ()),
    ],
)
def test_generation_config_adds_stop_ids(config, generation, expected, tmp_path):
    assert (
        read_config(write(tmp_path, SMALL | {"eos_token_id": config}, generation)).eos_token_ids == expected
    )


def test_ids_outside_of_the_vocabulary_are_left_out_with_a_warning(tmp_path, caplog):
    ids = {"bos_token_id": -1, "eos_token_id": [2, 320, -1, 319]}
    config = read_config(write(tmp_path, SMALL | ids, {"eos_token_id": [5, 50256]}))
    assert (config.bos_token_id, config.eos_token_ids) == (None, (2, 319, 5))
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.partition(": ")[2] for text in told] == [
        "bos_token_id has -1, outside of the vocabulary of 320 tokens: left out",
        "eos_token_id has 320, -1, outside of the vocabulary of 320 tokens: left out",
        "eos_token_id has 50256, outside of the vocabulary of 320 tokens: left out",
    ]


def test_the_defaults_of_transformers_are_read(tmp_path):
    """Their end token may be outside of their vocabulary."""
    for theirs in (Starcoder2Config(), Starcoder2Config(vocab_size=300)):
        theirs.save_pretrained(tmp_path)
        assert read_config(tmp_path).vocab_size == theirs.vocab_size


GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "torch_dtype": "float32",
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
}


def test_the_text_part_of_a_published_config(tmp_path):
    config = read_config(write(tmp_path, GEMMA_3_4B, {"eos_token_id": [1, 106], "bos_token_id": 2}))
    assert (config.model_type, config.num_hidden_layers, config.vocab_size) == ("gemma3_text", 34, 262208)
    assert (config.eos_token_ids, config.dtype, config.is_part) == ((1, 106), "bfloat16", True)
    assert config.tie_word_embeddings
    assert config.architectures == ("Gemma3ForConditionalGeneration",)
    assert not read_config(write(tmp_path, GEMMA_3_4B | {"tie_word_embeddings": False})).tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"text_config": None}, "text_config is None, expected an object that describes the text model"),
        ({"text_config": {"model_type": "mamba"}}, "config.json: text_config: model_type is 'mamba', which"),
        ({"is_causal": False}, "text_config: is_causal is False, expected true"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized checkpoints are not"),
        ({"model_type": "paligemma"}, "'paligemma', which .* Its text_config is of model_type 'gemma3_text'; the text "
         "part is served of gemma3, mistral3"),
    ],
)  # fmt: skip
def test_a_text_part_that_cannot_be_served_is_told_why(changes, problem, tmp_path):
    with pytest.raises(ModelError, match=problem):
        read_config(write(tmp_path, GEMMA_3_4B | changes))


def test_config_can_key_a_cache(tmp_path):
    one, two = (read_config(write(tmp_path, LLAMA_31)) for _ in range(2))
    assert hash(one) == hash(two)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.vocab_size = 5  # type: ignore[misc]


def test_families_bring_their_own_readers(tmp_path):
    def double(fields: Fields) -> ModelConfig:
        return dataclasses.replace(common_config(fields), vocab_size=fields.integer("words", low=1, high=9))

    folder = write(tmp_path, SMALL | {"model_type": "other", "words": 7})
    assert read_config(folder, {"other": double}).vocab_size == 7
    with pytest.raises(ModelError, match="model_type is 'llama', .* supported: other"):
        read_config(write(tmp_path, SMALL), {"other": double})


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in SMALL.items() if k != key}


def scaled(**scaling: Any) -> dict[str, Any]:
    return SMALL | {"rope_scaling": scaling}


LLAMA_3_HALF = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
WRONG = {
    "broken JSON": ("{", "config.json is not valid JSON"),
    "a list": ("[]", "holds a JSON list, expected an object"),
    "nested": ("[" * 200_000, "nested too deeply|not valid JSON"),
    "the same key twice": ('{"a": 1, "a": 2}', "'a' appears twice"),
    "a number of 10000 digits": (json.dumps(SMALL)[:-1] + ', "x": ' + "9" * 10_000 + "}", "not valid JSON"),
    "no model_type": (without("model_type"), "config.json lacks model_type"),
    "model_type is a list": (SMALL | {"model_type": ["llama"]}, "model_type is .* expected a string"),
    "another family": (SMALL | {"model_type": "mamba"}, "'mamba', which jinfer does not .*: .*gemma, .*llama, "),
    "quantized": (SMALL | {"quantization_config": {"quant_method": "gptq"}}, "quantized checkpoints are not"),
    **{f"no {key}": (without(key), f"config.json lacks {key}") for key in list(SMALL)[1:]},
    "a size is text": (SMALL | {"hidden_size": "64"}, "hidden_size is '64', expected an integer from 1"),
    "a size is a float": (SMALL | {"hidden_size": 64.0}, "hidden_size is 64.0, expected an integer"),
    "a size is true": (SMALL | {"num_hidden_layers": True}, "num_hidden_layers is True"),
    "negative": (SMALL | {"intermediate_size": -1}, "intermediate_size is -1"),
    "zero": (SMALL | {"vocab_size": 0}, "vocab_size is 0"),
    "huge": (SMALL | {"vocab_size": 10**30}, "vocab_size is 1000.* to 16777216"),
    "endless": (SMALL | {"hidden_size": float("inf")}, "hidden_size is inf"),
    "heads do not divide": (SMALL | {"hidden_size": 60}, "hidden_size is 60, expected a multiple of .*8"),
    "KV heads do not divide": (SMALL | {"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor"),
    "more KV heads than heads": (SMALL | {"num_key_value_heads": 16}, "num_key_value_heads is 16"),
    "odd head": (SMALL | {"head_dim": 5}, "5 of the 5 numbers of a head .* expected an even number"),
    "odd derived head": (SMALL | {"hidden_size": 40}, "5 of the 5 numbers of a head .* expected an even number"),
    "eps is nan": (SMALL | {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "flag is a number": (SMALL | {"attention_bias": 1}, "attention_bias is 1, expected true or false"),
    "dtype is unknown": (SMALL | {"torch_dtype": "int4"}, "torch_dtype is 'int4', expected one of float32"),
    "architectures": (SMALL | {"architectures": "LlamaForCausalLM"}, "architectures is .*, expected a list"),
    "eos is a float": (SMALL | {"eos_token_id": [2, 3.0]}, r"eos_token_id is \[2, 3.0\], expected an integer"),
    "not causal": (SMALL | {"is_causal": False}, "is_causal is False, expected true"),
    "not causal, as null": (SMALL | {"is_causal": None}, "is_causal is None, expected true"),
    "bos is text": (SMALL | {"bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
    "theta": (SMALL | {"rope_theta": -1.0}, "rope_theta is -1.0"),
    "theta inside": (SMALL | {"rope_parameters": {"rope_theta": "big"}}, "rope_parameters: rope_theta is 'big'"),
    "scaling is a list": (SMALL | {"rope_scaling": [1]}, "rope_scaling is .* expected an object"),
    "scaling of no kind": (scaled(type="magic", factor=2.0), "rope type 'magic' is not supported; supported"),
    "kind is a number": (scaled(rope_type=3), "rope_type is 3"),
    "no factor": (scaled(type="linear"), "rope_scaling lacks factor"),
    "factor below 1": (scaled(type="dynamic", factor=0.5), "factor is 0.5, expected a number from 1"),
    "llama3 without high": (SMALL | {"rope_scaling": LLAMA_3_HALF}, "lacks high_freq_factor"),
    "llama3 with high below low": (
        SMALL | {"rope_scaling": LLAMA_3_HALF | {"high_freq_factor": 1.0}},
        "high_freq_factor is 1.0, expected more than",
    ),
    "yarn betas": (scaled(type="yarn", factor=2.0, beta_fast=1.0, beta_slow=2.0), "beta_fast is 1.0"),
    "partly rotated": (SMALL | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_nonsense_is_named(case, tmp_path):
    config, problem = WRONG[case]
    with pytest.raises(ModelError, match=problem) as caught:
        read_config(write(tmp_path, config))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert len(str(caught.value)) < 600


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"config.json does not exist: expected a model folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config.json cannot be read: Is a directory"):
        read_config(tmp_path)


@pytest.mark.parametrize("generation", ["text", [1], {"eos_token_id": "</s>"}, {"eos_token_id": [1, True]}])
def test_broken_generation_config_is_named(generation, tmp_path):
    with pytest.raises(ModelError, match=r"generation_config.json"):
        read_config(write(tmp_path, SMALL, generation))


@pytest.mark.parametrize("nonsense", [None, True, -1, 0, 7, 1.5, 1e400, 10**40, "x", [], {}, [[1]], {"a": 1}])
def test_no_value_does_more_than_raise(nonsense, tmp_path):
    """Every key of two full configs, replaced in turn: a ModelConfig or a ModelError, nothing else."""
    for full in (LLAMA_31, NEW_SPELLING):
        for key in full:
            try:
                assert isinstance(read_config(write(tmp_path, full | {key: nonsense})), ModelConfig)
            except ModelError:
                continue
        inner = "rope_scaling" if "rope_scaling" in full else "rope_parameters"
        for key in full[inner]:
            try:
                read_config(write(tmp_path, full | {inner: full[inner] | {key: nonsense}}))
            except ModelError:
                continue
