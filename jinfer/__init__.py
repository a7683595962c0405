"""jinfer: serves large language models with JAX on TPU, NVIDIA GPU and CPU."""

from __future__ import annotations

import signal
import sys

if sys.argv[:1] == ["-m"] and "jinfer.serve" in sys.orig_argv:
    # This is the first line of ours that `python -m jinfer.serve` runs. From here on Ctrl-C ends the process without
    # a traceback; jinfer/serve.py takes over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinfer.async_engine import AsyncEngine
    from jinfer.config import EngineConfig, ServerConfig
    from jinfer.engine import Engine
    from jinfer.errors import (
        ConfigError,
        EngineDeadError,
        JinferError,
        ModelError,
        QueueFullError,
        RequestError,
        RequestFailedError,
        UserError,
        WeightsError,
    )
    from jinfer.llm import LLM
    from jinfer.models.functional import forward, load_params
    from jinfer.pooling import PoolingParams
    from jinfer.request import (
        Completion,
        EmbeddingOutput,
        FinishReason,
        OutputDelta,
        RequestOutput,
        ScoreOutput,
        TokenLogprobs,
    )
    from jinfer.sampling.params import SamplingParams

__version__ = "0.1.0"

# Names are imported when first used: `import jinfer` costs milliseconds, and jax starts only when it is needed.
_HOMES = {
    "LLM": "jinfer.llm",
    "SamplingParams": "jinfer.sampling.params",
    "EngineConfig": "jinfer.config",
    "ServerConfig": "jinfer.config",
    "Engine": "jinfer.engine",
    "AsyncEngine": "jinfer.async_engine",
    "PoolingParams": "jinfer.pooling",
    "Completion": "jinfer.request",
    "EmbeddingOutput": "jinfer.request",
    "ScoreOutput": "jinfer.request",
    "FinishReason": "jinfer.request",
    "OutputDelta": "jinfer.request",
    "RequestOutput": "jinfer.request",
    "TokenLogprobs": "jinfer.request",
    "ConfigError": "jinfer.errors",
    "EngineDeadError": "jinfer.errors",
    "JinferError": "jinfer.errors",
    "ModelError": "jinfer.errors",
    "QueueFullError": "jinfer.errors",
    "RequestError": "jinfer.errors",
    "RequestFailedError": "jinfer.errors",
    "UserError": "jinfer.errors",
    "WeightsError": "jinfer.errors",
    "forward": "jinfer.models.functional",
    "load_params": "jinfer.models.functional",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "Completion",
    "ConfigError",
    "EmbeddingOutput",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "FinishReason",
    "JinferError",
    "ModelError",
    "OutputDelta",
    "PoolingParams",
    "QueueFullError",
    "RequestError",
    "RequestFailedError",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "ServerConfig",
    "TokenLogprobs",
    "UserError",
    "WeightsError",
    "__version__",
    "forward",
    "load_params",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'jinfer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
