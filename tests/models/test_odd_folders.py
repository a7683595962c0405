"""Folders as people have them: adapters, quantizations that are off, buffers among the weights, sizes of no machine."""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jinfer import forward, load_params
from jinfer.config import EngineConfig
from jinfer.errors import ConfigError, ModelError
from jinfer.models.hf_config import read_config
from jinfer.models.loading import make_spec
from tests.support.config_mutations import MODELS, SIZES
from tests.support.models import hf_logits, make_model, random_prompt, relative_error

TOKENS = random_prompt(3, 11, 60)
# float16 keeps 11 bits: each of a few hundred roundings is off by at most 5e-4 of its number.
FLOAT16 = 2e-2


def tiny(model_type: str, folder: Any) -> Any:
    return make_model(model_type, folder, **{**SIZES, **MODELS.get(model_type, {})})


def logits(folder: Any, **options: Any) -> np.ndarray:
    return np.asarray(jax.jit(forward)(load_params(str(folder), **options), jnp.asarray(TOKENS)))


def change(folder: Any, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def llama(tmp_path):
    return tiny("llama", tmp_path)


def test_buffers_among_the_weights_are_passed_over(llama):
    file = llama / "model.safetensors"
    tensors = load_file(file)
    names = ["rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "rotary_emb.cos_cached", "attn.bias"]
    names += ["rotary_emb.sin_cached", "masked_bias", "attn.masked_bias", "self_attn.bias", "position_ids"]
    inside = {f"model.layers.0.self_attn.{name}": np.ones(4, np.float32) for name in names}
    save_file({**tensors, **inside, "model.rotary_emb.inv_freq": np.ones(4, np.float32)}, file)
    load_params(str(llama))
    for other in ("self_attn.q_proj.bias", "self_attn.inv_freq_scale", "mlp.bias", "masked_bias.weight"):
        save_file({**tensors, f"model.layers.0.{other}": np.ones(4, np.float32)}, file)
        with pytest.raises(ModelError, match=f"does not use: model.layers.0.{other}"):
            load_params(str(llama))


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_float16(model_type, tmp_path):
    folder = tiny(model_type, tmp_path)
    found = logits(folder, dtype="float16")
    assert found.dtype == np.float32
    assert relative_error(found, hf_logits(folder, TOKENS)) < FLOAT16


def test_tpus_do_not_compute_float16(llama):
    with pytest.raises(ConfigError, match="dtype is float16, which TPUs do not compute: use bfloat16"):
        make_spec(read_config(llama), EngineConfig(dtype="float16"), "tpu")


def test_an_adapter_is_named(llama, tmp_path):
    (llama / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(
        ModelError, match=r"adapter_config.json: an adapter of 'owner/base' beside a model, which .*merge"
    ):
        read_config(llama)
    (llama / "config.json").unlink()
    with pytest.raises(ModelError, match="an adapter of 'owner/base', expected a whole model: merge it"):
        read_config(llama)


def test_a_quantization_that_is_off_is_none(llama):
    off = {"load_in_4bit": False, "load_in_8bit": False, "llm_int8_threshold": 6.0}
    before = read_config(llama)
    for section in (off, {**off, "quant_method": "bitsandbytes", "_load_in_4bit": False}):
        change(llama, quantization_config=section)
        assert read_config(llama) == before
    for section in (
        {**off, "load_in_4bit": True},
        {"quant_method": "bitsandbytes"},
        {**off, "quant_method": "awq"},
    ):
        change(llama, quantization_config=section)
        with pytest.raises(ModelError, match="has a quantization_config: quantized checkpoints are not"):
            read_config(llama)
    change(llama, quantization_config=None, quantization={"bits": 4})
    with pytest.raises(ModelError, match="has a quantization: quantized checkpoints are not"):
        read_config(llama)


ABSURD = {
    "experts": ({"num_experts": 65536, "num_experts_per_tok": 2}, "268,435,456 experts in 4096 layers, expected at most"),
    "depth": ({}, "4,096 layers, and the checkpoint has 3: config.json belongs to other weights"),
    "width": ({"hidden_size": 2**20, "intermediate_size": 2**22}, r"parameters \(.* TiB in bfloat16\), expected at most"),
    "vocabulary": ({"vocab_size": 2**24, "hidden_size": 2**14}, "TiB in bfloat16.*and the checkpoint holds [0-9,]+ num"),
}  # fmt: skip


@pytest.mark.parametrize("case", ABSURD)
def test_sizes_of_no_machine_are_refused_at_once(case, tmp_path):
    changes, problem = ABSURD[case]
    folder = tiny("qwen3_moe" if case == "experts" else "llama", tmp_path)
    change(folder, **({"num_hidden_layers": 3 if case == "vocabulary" else 4096} | changes))
    if case == "experts":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if key != "num_local_experts"})
        )
    start = time.process_time()
    with pytest.raises(ModelError, match=problem):
        load_params(str(folder))
    assert time.process_time() - start < 5
