"""What happens before jax starts: importing jinfer starts no backend, so that a config can still ask for devices."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *arguments: str) -> str:
    """Runs code in a process of its own, without the devices that these tests ask for."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_importing_every_public_name_starts_no_backend():
    code = """
import jinfer
for name in jinfer.__all__:
    getattr(jinfer, name)
import jinfer.models.loading, jinfer.weights.orbax_store, serve.app
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert python(code).strip() == "False"


def test_a_fresh_process_gets_the_devices_that_it_asks_for(tiny_llama, tmp_path):
    code = """
import sys
import jax
from jinfer import LLM, SamplingParams, load_params
folder, cache = sys.argv[1:]
options = {"tensor_parallel_size": 2, "compilation_cache_dir": cache, "optimization_level": 0}
params = load_params(folder, **options)
llm = LLM(folder, warmup=False, max_num_seqs=1, max_num_batched_tokens=16, max_model_len=64, **options)
print(len(jax.devices()), *llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=4))[0].token_ids)
"""
    from tests.support.models import hf_greedy

    devices, *tokens = map(int, python(code, str(tiny_llama), str(tmp_path / "cache")).split())
    assert devices == 2
    assert tokens == hf_greedy(tiny_llama, [1, 2, 3], 4)[0]
    assert any((tmp_path / "cache").iterdir()), "the compile cache should have been written"
