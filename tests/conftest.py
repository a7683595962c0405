"""Settings for every test: a CPU with 8 virtual devices, strict dtypes, no hub, one compile cache."""

import os
from pathlib import Path

# Before jax and huggingface_hub are imported: both read their environment once. Subprocesses inherit these.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax-tests"

jax.config.update("jax_num_cpu_devices", 8)
# A silent promotion (bf16 + f32) hides a cast nobody chose. Code that must mix says so with an explicit cast.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# A second run of the suite finds its compiled programs here.
CACHE.mkdir(parents=True, exist_ok=True)
CACHE.chmod(0o700)  # servers that tests start use it too, and refuse one that others could write to
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

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
        help="compare each configuration of a family on two and on four devices, and not on the one or the other",
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
