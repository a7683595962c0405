"""Settings for every test: a CPU with 8 virtual devices, strict dtypes, no hub, one compile cache."""

import os
from pathlib import Path

# Before jax and huggingface_hub are imported: both read their environment once. Subprocesses inherit these.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax-tests"

jax.config.update("jax_num_cpu_devices", 8)
# A silent promotion (bf16 + f32) hides a cast nobody chose. Code that must mix says so with an explicit cast.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# A second run of the suite finds its compiled programs here.
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

try:
    import torch
except ImportError:  # the oracle's tests skip themselves where the test extra is not installed
    pass
else:
    torch.set_num_threads(2)
