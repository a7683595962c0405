"""The step of Llama-3-8B compiles for a TPU that is not there, with KV updated in place."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: the test extra brings it on Linux x86-64",
)


def check(*flags: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: libtpu reads its environment once.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
    command = [sys.executable, "-m", "tools.compile_check", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@NEEDS_LIBTPU
@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.timeout(900)
def test_llama_3_8b_compiles_for_v6e_and_updates_kv_in_place():
    result = check("--model", "llama-3-8b", "--topology", "v6e:2x2", "--tensor-parallel-size", "4")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [
        line.split("|")[1:-1]
        for line in result.stdout.splitlines()
        if line.startswith(("| decode", "| mixed"))
    ]
    assert [row[0].strip() for row in rows] == ["decode[64]", "mixed[512]"]
    for _, _, arguments, kv, aliased, temporaries in rows:
        # A quarter of 64 rows of 2048 tokens: 2 * 32 layers * 8 heads * 128 * 2 bytes a token.
        assert float(kv) == pytest.approx(64 * 2048 * 131072 / 4 / 1024**3, rel=0.01)
        assert float(aliased) >= float(kv)
        assert float(arguments) < 8
        assert float(temporaries) > 0


@NEEDS_LIBTPU
@pytest.mark.tpu_compile
def test_a_model_whose_heads_do_not_divide_is_refused(tmp_path):
    config = json.loads((ROOT / "configs/models/llama-3-8b/config.json").read_text())
    config |= {"num_attention_heads": 30, "num_key_value_heads": 6, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = check("--model", str(tmp_path))
    assert result.returncode == 1
    assert "tensor_parallel_size is 4 and the model has 30 attention heads" in result.stderr
