"""`python -m tools.convert`: what it writes serves as the original does, on any number of devices."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jinfer.config import EngineConfig
from jinfer.models.functional import forward
from jinfer.models.loading import load_model, targets
from jinfer.models.refit import refit_kv_heads
from jinfer.weights.orbax_store import read_meta, restore_orbax
from tools.convert import main

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kept": True},  # of no use here, and kept
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama of random bfloat16 weights, with files that belong to a model and files that do not."""
    folder, rng = tmp_path_factory.mktemp("convert") / "model", np.random.default_rng(0)
    folder.mkdir()
    sizes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (32, 16), "norm.weight": (16,)}
    for i in range(3):
        layer = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (4, 16), "self_attn.v_proj": (4, 16)}
        layer |= {"self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16)}
        layer |= {"mlp.down_proj": (16, 24)}
        sizes |= {f"layers.{i}.{name}.weight": size for name, size in layer.items()}
        sizes |= {f"layers.{i}.{name}.bias": size[:1] for name, size in layer.items() if "attn" in name}
        sizes |= {f"layers.{i}.{name}_layernorm.weight": (16,) for name in ("input", "post_attention")}
    tensors = {f"model.{name}": rng.standard_normal(size) / 4 for name, size in sizes.items()}
    tensors["lm_head.weight"] = rng.standard_normal((32, 16))
    save_file(
        {name: v.astype(ml_dtypes.bfloat16) for name, v in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "additional_chat_templates").mkdir()
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "LICENSE",
        "additional_chat_templates/a.jinja",
    ):
        (folder / name).write_text(name)
    for name in ("modeling.py", "pytorch_model.bin", "model.safetensors.index.json"):
        (folder / name).write_text(name)
    return folder


def convert(model: Path, output: Path, *flags: str) -> Path:
    assert main(["--model", str(model), "--output", str(output), *flags]) == 0
    return output


@pytest.fixture(scope="module")
def converted(model) -> Path:
    return convert(model, model.parent / "out", "--tensor-parallel-size", "2")


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert (ours[path].dtype, ours[path].sharding) == (array.dtype, array.sharding), path
        np.testing.assert_array_equal(ours[path], array)


@pytest.mark.parametrize("loop", ["scan", "unroll"])
@pytest.mark.parametrize("devices", [1, 2])
def test_serves_as_the_original_does(devices, loop, model, converted):
    loaded = [
        load_model(
            EngineConfig(model=str(folder), load_format=form, tensor_parallel_size=devices, layer_loop=loop)
        )
        for folder, form in ((model, "auto"), (converted, "orbax"), (converted, "auto"))
    ]
    same(loaded[1].params.arrays, loaded[0].params.arrays)
    same(loaded[2].params.arrays, loaded[0].params.arrays)
    tokens = jnp.arange(12)
    logits = [np.asarray(forward(one.params, tokens)) for one in loaded[:2]]
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("loop", ["scan", "unroll"])
@pytest.mark.parametrize("devices", [4, 8])
def test_serves_on_more_devices_than_kv_heads(devices, loop, model, converted):
    engine = EngineConfig(model=str(model), tensor_parallel_size=devices, layer_loop=loop)
    loaded = load_model(engine)
    restored = restore_orbax(converted, targets(loaded.spec, loaded.mesh), refit=refit_kv_heads)
    same(restored, loaded.params.arrays)


def test_folder_holds_data_and_tells_the_truth(converted):
    files = {str(f.relative_to(converted)) for f in converted.rglob("*") if f.is_file()}
    assert {name for name in files if not name.startswith("orbax/")} == {
        "LICENSE",
        "additional_chat_templates/a.jinja",
        "chat_template.jinja",
        "config.json",
        "jinfer.json",
        "merges.txt",
        "tokenizer.json",
    }
    config = json.loads((converted / "config.json").read_text())
    assert config == {k: v for k, v in CONFIG.items() if k != "torch_dtype"} | {"dtype": "bfloat16"}
    expected = {"dtype": "bfloat16", "tensor_parallel_size": 2, "source": "model", "head": "own"}
    assert read_meta(converted) == expected


def test_converts_to_another_dtype_and_again(model, converted, tmp_path):
    wide = convert(model, tmp_path / "wide", "--dtype", "float32")
    again = convert(wide, tmp_path / "again", "--dtype", "bfloat16")
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"
    for folder in (wide, again):
        same(
            load_model(EngineConfig(model=str(folder))).params.arrays,
            load_model(EngineConfig(model=str(converted))).params.arrays,
        )


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "no output folder given: say where to write with --output"),
        (["--output", "{full}"], "is not an empty folder"),
        (["--output", "{full}/config.json"], "is not an empty folder"),
        (["--output", "{new}", "--model", "{new}/gone"], "is not an existing folder"),
        (["--output", "{new}", "--tensor-parallel-size", "3"], "tensor_parallel_size is 3"),
    ],
)
def test_mistakes_are_explained_and_nothing_is_written(flags, problem, model, tmp_path, capsys):
    names = {"full": model, "new": tmp_path / "new"}
    given = [flag.format(**names) for flag in flags]
    if "--model" not in given:
        given += ["--model", str(model)]
    assert main(given) == 1
    assert problem in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_line(model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tools.convert",
        "--model",
        str(model),
        "--output",
        str(tmp_path / "out"),
    ]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: ")
    assert f"serve it with --model {tmp_path / 'out'}" in done.stdout
    bfloat16 = load_model(EngineConfig(model=str(tmp_path / "out"), dtype="bfloat16"))
    assert {array.dtype for array in bfloat16.params.arrays.values()} == {jax.numpy.dtype("bfloat16")}
