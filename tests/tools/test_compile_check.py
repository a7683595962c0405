"""A slice of the compile check: the whole table is one command and takes minutes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import targets
from tools.compile_check import __main__ as check
from tools.compile_check import kernels
from tools.kernel_cases import MODELS, Case, models, read_heads

ROOT = Path(__file__).resolve().parents[2]
V6E, H200 = targets.find("v6e"), targets.find("H200")
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: the test extra brings it on Linux x86-64",
)
NEEDS_GPU_COMPILER = pytest.mark.skipif(H200.missing() is not None, reason=f"{H200.missing()}")


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: libtpu reads its environment once.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
    command = [sys.executable, "-m", "tools.compile_check", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def rows_of(text: str, *first: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith(tuple(f"| {name}" for name in first))
    ]


@NEEDS_LIBTPU
@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.timeout(900)
def test_llama_3_8b_compiles_for_v6e_and_updates_kv_in_place(tmp_path):
    """A quarter of its layers at full width: all 32 take more than twice as long, and their layers are alike."""
    config = json.loads((ROOT / "configs/models/llama-3-8b/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 8}))
    result = run("step", "--model", str(tmp_path), "--target", "v6e", "--tensor-parallel-size", "4")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = rows_of(result.stdout, "decode", "mixed")
    assert [row[0] for row in rows] == ["decode[64]", "mixed[512]"]
    for _, _, arguments, kv, aliased, temporaries in rows:
        # A quarter of 64 rows of 2048 tokens: 2 * 8 layers * 8 heads * 128 * 2 bytes a token.
        assert float(kv) == pytest.approx(64 * 2048 * 32768 / 4 / 1024**3, rel=0.01)
        assert float(aliased) >= float(kv)
        assert float(arguments) < 2.5
        # The logits of 64 rows are 8.2 MB of it.
        assert 0 < float(temporaries) < 16


@NEEDS_LIBTPU
@pytest.mark.tpu_compile
def test_a_model_whose_heads_do_not_divide_is_refused(tmp_path):
    config = json.loads((ROOT / "configs/models/llama-3-8b/config.json").read_text())
    config |= {"num_attention_heads": 30, "num_key_value_heads": 6, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("step", "--model", str(tmp_path), "--attention-backend", "xla")
    assert result.returncode == 1
    assert "tensor_parallel_size is 4 and the model has 30 attention heads" in result.stderr


@NEEDS_LIBTPU
@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["v5e", "tpu7x"])
def test_kernels_compile_for_tpus(target):
    result = run("kernels", "--target", target, "--model", "phi-3-mini")
    assert result.returncode == 0, result.stdout
    assert [row[1:3] for row in rows_of(result.stdout, target)] == [
        ["paged_attention decode, phi-3-mini, tpu", "yes"],
        ["paged_attention mixed, phi-3-mini, tpu", "yes"],
        ["flash_attention prefill, phi-3-mini, tpu", "yes"],
    ]


@NEEDS_GPU_COMPILER
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_compile_for_an_h200():
    result = run("kernels", "--target", "H200", "--model", "llama-3-8b")
    assert result.returncode == 0, result.stdout
    assert {row[2] for row in rows_of(result.stdout, "H200")} == {"yes"}


def test_a_compiler_that_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setattr(targets.GPUTarget, "missing", lambda self: "not installed: nvcc")
    assert check.main(["kernels", "--target", "H200,B200"]) == 2
    assert [row[2] for row in rows_of(capsys.readouterr().out, "H200", "B200")] == [
        "not tried: not installed: nvcc"
    ] * 2


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ({}, "yes"),
        ({"error": "Mosaic: no | such layout"}, "**no**: Mosaic: no / such layout"),
        ({"kernels": 0}, "**no**: the program holds no kernel"),
        ({"alias_bytes": 9}, "**no**: the KV pool is copied"),
    ],
)
def test_a_program_passes_with_a_kernel_and_its_kv_in_place(monkeypatch, capsys, answer, verdict):
    good = {"error": None, "seconds": 1.0, "temp_bytes": 2e6, "alias_bytes": 10, "kv_bytes": 10, "kernels": 1}
    monkeypatch.setattr(targets.TPUTarget, "missing", lambda self: None)
    monkeypatch.setattr(kernels, "ask_child", lambda *_, **__: ([good | answer] * 3, None))
    status = check.main(["kernels", "--target", "v6e", "--model", "phi-3-mini"])
    rows = rows_of(capsys.readouterr().out, "v6e")
    assert [row[2] for row in rows] == [verdict] * 3
    assert status == (0 if verdict == "yes" else 1)


def test_a_compiler_that_takes_the_process_with_it_costs_one_case(monkeypatch):
    good = {"error": None, "seconds": 1.0, "temp_bytes": 0, "alias_bytes": 0, "kv_bytes": 0, "kernels": 1}
    replies = iter([([good], "exit status -6: Check failed"), ([good], None)])
    monkeypatch.setattr(kernels, "ask_child", lambda *_, **__: next(replies))
    cases = [Case("flash_attention", "prefill", read_heads("phi-3-mini"), "gpu", rows=n) for n in (1, 2, 3)]
    problems = [result.problem for result in kernels.check(H200, cases)]
    assert problems == [None, "exit status -6: Check failed", None]


def test_every_model_is_checked_at_the_heads_that_one_device_has():
    assert {"llama-3-8b", "llama-3-70b", "qwen2.5-7b", "gemma-2-9b", "phi-3-mini"} <= set(models())
    heads = {case.heads.model: case.heads for case in kernels.cases(V6E, models())}
    assert (heads["llama-3-70b / 8"].heads, heads["llama-3-70b / 8"].kv_heads) == (8, 1)
    assert (heads["qwen2.5-7b"].heads, heads["qwen2.5-7b"].kv_heads, heads["qwen2.5-7b"].window) == (
        28,
        4,
        None,
    )
    gemma = heads["gemma-2-9b"]
    assert (gemma.head_dim, gemma.window, gemma.soft_cap) == (256, 4096, 50.0)
    assert heads["phi-3-mini"].head_dim == 96


def test_latent_attention_has_one_head_of_keys_on_every_device():
    cases = kernels.cases(V6E, ["deepseek-v2-lite", "deepseek-v3"])
    heads = {case.heads.model: case.heads for case in cases}
    assert {name: (h.heads, h.kv_heads, h.head_dim, h.value_dim) for name, h in heads.items()} == {
        "deepseek-v2-lite / 4": (4, 1, 576, 512),
        "deepseek-v3 / 4": (32, 1, 576, 512),
    }
    assert all(h.shared_values for h in heads.values())
    assert {case.op for case in cases} == {"paged_attention"}
    assert {case.kv_dtype for case in cases} == {"bfloat16", "int8", "float8_e4m3fn"}
    # The GPU's kernels keep keys and values apart.
    assert {case.implementation for case in kernels.cases(H200, ["deepseek-v3"])} == {"xla"}


def test_a_gpu_without_wgmma_is_compiled_for_with_xla():
    b200 = {case.implementation for case in kernels.cases(targets.find("B200"), ["llama-3-8b"])}
    assert b200 == {"xla"}
    assert "gpu" in {case.implementation for case in kernels.cases(H200, ["llama-3-8b"])}


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="28 and 4 heads do not divide by 8"):
        read_heads("qwen2.5-7b").share(8)


def test_an_unknown_model_lists_the_known_ones(capsys):
    assert check.main(["kernels", "--target", "v6e", "--model", "gpt-9"]) == 1
    assert "unknown models ['gpt-9']" in capsys.readouterr().err
    assert MODELS.is_dir()


def test_a_child_that_dies_leaves_its_last_words(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text(
        "import sys\nprint('{\"done\": 1}', flush=True)\nsys.exit('fatal: no such chip')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers, reason = targets.ask_child("dies", V6E, {})
    assert answers == [{"done": 1}]
    assert reason == "exit status 1: fatal: no such chip"
    with pytest.raises(targets.ChildError, match="no such chip"):
        targets.run_child("dies", V6E, {})


def test_a_child_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert targets.ask_child("hangs", V6E, {}, timeout=1)[1] == "did not end within 1 s"
