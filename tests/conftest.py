"""Settings for every test: a CPU with 8 virtual devices, strict dtypes, no hub, one compile cache."""

import os
import signal
import subprocess
import sys
from pathlib import Path

# Before jax and huggingface_hub are imported: both read their environment once. Subprocesses inherit these.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Most of a test's time is compiling, and what is not optimized computes the same. The steps of an engine are compiled as
# its own options say, see `jinfer.programs.compiler_options`.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it too
    quick = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"}
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    # XLA ends a process with a flag that its version does not know.
    if subprocess.run(probe, env=quick, capture_output=True).returncode == 0:
        os.environ.update(quick)

import jax  # noqa: E402
import pytest  # noqa: E402

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax-tests"

jax.config.update("jax_num_cpu_devices", 8)
# A silent promotion (bf16 + f32) hides a cast nobody chose. Code that must mix says so with an explicit cast.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# A second run of the suite finds its compiled programs here.
CACHE.mkdir(parents=True, exist_ok=True)
CACHE.chmod(0o700)  # servers that tests start use it too, and refuse one that others could write to
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# Python leaves SIGINT ignored where it was, as in a shell's background job, and tests interrupt themselves.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    import torch
except ImportError:  # the oracle's tests skip themselves where the test extra is not installed
    pass
else:
    torch.set_num_threads(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-devices",
        action="store_true",
        help="compare each configuration of a family on one, two and four devices, and not on one of these in turn",
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A random-weight Llama with one token per byte; its 32 prompts of tests/oracle have no near ties."""
    from tests.support.models import GROUPED, make_llama

    return make_llama(tmp_path_factory.mktemp("tiny") / "llama", seed=24, **GROUPED)


@pytest.fixture(scope="session")
def warm_llm(tiny_llama):
    """An `LLM` with every step compiled, shared by the tests that leave an engine as they found it."""
    from jinfer import LLM
    from tests.support.engines import SMALL

    return LLM(str(tiny_llama), **{**SMALL, "max_num_seqs": 8, "max_num_batched_tokens": 32, "warmup": True})
