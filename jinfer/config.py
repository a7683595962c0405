"""Configuration: frozen dataclasses. YAML keys and command-line flags are made from their fields (see `cli.py`)."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jinfer.errors import ConfigError

BUNDLED_MODEL = "tiny"
METRICS_PREFIX = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]{0,63}")
LIST = "tuple[str, ...]"  # the type of a field that takes several texts

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A config field with its help text and range; checked by `check_fields`, shown by `--help`."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def check_fields(config: Any) -> None:
    """Raises ConfigError naming the first field whose value is out of its range, of the wrong type or no choice."""
    for f in dataclasses.fields(config):
        value, meta = getattr(config, f.name), f.metadata
        if isinstance(value, os.PathLike) and "str" in str(f.type):
            value = os.fspath(value)
            object.__setattr__(config, f.name, value)  # the class is frozen
        optional = "None" in str(f.type)
        if value is None:
            if not optional:
                raise ConfigError(f"{f.name} is None, expected {f.type}")
            continue
        kind = str(f.type).replace(" | None", "")
        if kind == LIST:
            _check_list(f.name, value)
            continue
        wanted = {"int": int, "float": (int, float), "bool": bool, "str": str}.get(kind)
        is_wrong_bool = isinstance(value, bool) and kind != "bool"
        if wanted is not None and (not isinstance(value, wanted) or is_wrong_bool):
            raise ConfigError(f"{f.name} is {value!r} ({type(value).__name__}), expected {kind}")
        low, high = meta.get("low"), meta.get("high")
        if (low is not None and value < low) or (high is not None and value > high):
            span = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ConfigError(f"{f.name} is {value!r}, expected {span}")
        choices = meta.get("choices")
        if choices and value not in choices:
            raise ConfigError(f"{f.name} is {value!r}, expected one of {', '.join(choices)}")


def _check_list(name: str, values: Any) -> None:
    for value in values:
        if not isinstance(value, str):
            raise ConfigError(f"{name} has {value!r} ({type(value).__name__}), expected text")
        if not value.strip():
            raise ConfigError(f"{name} is empty: give a value, or leave it out")


def read_lists(config: Any) -> None:
    """Makes tuples of the lists, and of the single texts, that were given for fields of type LIST."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.type == LIST and not isinstance(value, tuple):
            if not isinstance(value, str | list):
                raise ConfigError(f"{f.name} is {value!r} ({type(value).__name__}), expected a list of text")
            object.__setattr__(config, f.name, (value,) if isinstance(value, str) else tuple(value))


@dataclass(frozen=True)
class EngineConfig:
    """How one engine runs one model. Shared by `LLM`, `AsyncEngine` and the server."""

    model: str = option(BUNDLED_MODEL, "model folder, hub id, or the name of the bundled model")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    tokenizer: str | None = option(None, "tokenizer folder or hub id, if not the model's own")
    load_format: str = option("auto", "what the model folder holds", choices=("auto", "safetensors", "orbax"))
    dtype: str = option(
        "auto",
        "compute and KV type; auto: the checkpoint's own on TPU and GPU, float32 on CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    generation_config: str = option(
        "auto",
        "defaults of requests (temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens): 'auto': of the "
        "model's generation_config.json; 'vllm': none; or a folder that has such a file. A request's own fields override "
        "them",
    )
    max_model_len: int | None = option(
        None, "longest prompt plus output in tokens; default: the model's own limit", low=2, high=2**24
    )
    max_num_seqs: int = option(32, "most sequences running at once", low=1, high=4096)
    max_seqs_per_request: int | None = option(
        None,
        "most sequences (choices and prompts) of one request that run beside requests with fewer; default: a quarter of "
        "max_num_seqs in a server, all of them in `LLM`",
        low=1,
        high=4096,
    )
    max_num_batched_tokens: int = option(
        512, "tokens of one step, prompt chunks included", low=16, high=131072
    )
    max_num_waiting: int = option(1024, "most requests waiting; more are refused", low=1, high=10**6)
    scheduling_policy: str = option("fcfs", "order of waiting requests", choices=("fcfs", "priority"))
    block_size: int | None = option(
        None, "tokens of a KV page; default: 8 on CPU, 32 on accelerators", low=8, high=128
    )
    gpu_memory_utilization: float = option(
        0.9, "share of an accelerator's memory that weights and KV may fill", low=0.05, high=1.0
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "bytes for KV pages; default: what the accelerator has left, or on CPU enough for max_num_seqs "
        "sequences within 2 GiB",
        low=1,
    )
    num_gpu_blocks_override: int | None = option(
        None,
        "KV pages, whatever the memory; layers with a window get no more of them than they can use",
        low=2,
        high=2**28,
    )
    enable_prefix_caching: bool = option(True, "share the KV pages of equal prompt beginnings")
    async_scheduling: bool = option(True, "dispatch a step before the last one's tokens are read")
    tensor_parallel_size: int = option(1, "devices that share each layer", low=1, high=1024)
    enable_expert_parallel: bool = option(
        False, "give each of those devices whole experts of a mixture, instead of a part of each"
    )
    expert_parallel_size: int = option(
        1,
        "sets of tensor_parallel_size devices that part the experts of a mixture among them; all else is in each set",
        low=1,
        high=1024,
    )
    layer_loop: str = option(
        "auto", "scan over stacked layers or unroll; auto: scan on TPU", choices=("auto", "scan", "unroll")
    )
    attention_backend: str = option(
        "auto",
        "implementation of pallas_kernels.paged_attention; a named one fails where it cannot run",
        choices=("auto", "reference", "xla", "cpu", "tpu", "gpu"),
    )
    optimization_level: int | None = option(
        None,
        "how much XLA optimizes each step: 0 compiles fastest, 3 optimizes most; default: 1 on CPU, XLA's own elsewhere",
        low=0,
        high=3,
    )
    seed: int = option(0, "seed of requests that bring none", low=0, high=2**31 - 1)
    compilation_cache_dir: str | None = option(
        None, "folder of the persistent compile cache; default: in the user's cache; 'off': none"
    )
    warmup: bool = option(True, "compile every step before the engine reports ready")

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.tensor_parallel_size * self.expert_parallel_size

    def __post_init__(self) -> None:
        check_fields(self)
        if self.enable_expert_parallel and self.expert_parallel_size > 1:
            raise ConfigError(
                f"enable_expert_parallel is set and expert_parallel_size is {self.expert_parallel_size}: the one parts "
                "experts among the devices that share a layer, the other among sets of them; leave one out"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs "
                f"({self.max_num_seqs}): every running sequence needs a token a step, raise the one or lower the other"
            )


@dataclass(frozen=True)
class ServerConfig:
    """How the HTTP server listens, protects itself and stops."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0: any free one", low=0, high=65535)
    uds: str | None = option(None, "path of a Unix socket to listen on, in place of host and port")
    ssl_certfile: str | None = option(
        None, "file with a certificate (PEM, chain included) to serve HTTPS with"
    )
    ssl_keyfile: str | None = option(None, "file with its key, if not in the same file")
    root_path: str | None = option(
        None, "prefix of all paths, if a proxy in front serves this server under one"
    )
    served_model_name: tuple[str, ...] = option(
        (), "names in the API, the first is the one in answers; default: the model's"
    )
    api_key: tuple[str, ...] = option(
        (),
        "keys, of which requests must carry one as a bearer token; the environment variable JINFER_API_KEY serves too, "
        "and does not show in the list of processes",
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "names that requests may have in the header Host, '*.example.org' and '*' included; default: on a loopback "
        "address localhost and the address, else any",
    )
    allowed_origins: tuple[str, ...] = option(
        (), "origins whose pages may use this server (CORS), or '*'; default: none but the server's own"
    )
    allowed_methods: tuple[str, ...] = option((), "methods that such pages may use; default: all")
    allowed_headers: tuple[str, ...] = option((), "headers that such pages may send; default: all")
    allow_credentials: bool = option(
        False, "let such pages send cookies and other credentials of the browser"
    )
    max_body_bytes: int = option(4 * 1024 * 1024, "largest request body", low=1024, high=2**31)
    request_timeout: float = option(600.0, "seconds after which a request is ended", low=0.1, high=86400.0)
    read_timeout: float = option(
        30.0,
        "seconds in which a request's headers have to arrive, and in which its body has to bring 1 KiB for each",
        low=0.1,
        high=3600.0,
    )
    keep_alive_timeout: float = option(
        75.0, "seconds that a connection stays open between two requests", low=0.1, high=3600.0
    )
    max_connections: int | None = option(
        None,
        "most open connections; default: what the limit of open files allows, at most 16384",
        low=8,
        high=2**20,
    )
    stream_keep_alive: float = option(
        10.0,
        "seconds of silence after which a stream sends a comment, so that nobody on the way closes it; 0: never",
        low=0.0,
        high=3600.0,
    )
    drain_timeout: float = option(
        30.0, "seconds that running requests get after SIGTERM", low=0.0, high=86400.0
    )
    health_timeout: float = option(
        120.0,
        "seconds without the end of a step, while there is work, after which /health and /ready answer 503",
        low=1.0,
        high=86400.0,
    )
    enable_prompt_tokens_details: bool = option(
        False,
        "show cached prompt tokens in `usage` also to clients without an API key or cache_salt of their own",
    )
    max_logprobs: int = option(20, "most alternatives per position a request may ask for", low=0, high=20)
    chat_template: str | None = option(None, "file with a chat template, if not the model's own")
    allow_special_tokens: bool = option(
        False, "the text of a special token in a message becomes that token, instead of staying text"
    )
    uvicorn_log_level: str = option(
        "warning",
        "log level of the HTTP layer",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
    )
    disable_log_requests: bool = option(True, "leave out a log line per request")
    metrics_prefix: str = option(
        "jinfer:", "beginning of the metrics' names; vllm: for dashboards made for vLLM"
    )
    enable_force_include_usage: bool = option(
        False, "end every stream with its usage, as if stream_options.include_usage were set"
    )

    def __post_init__(self) -> None:
        read_lists(self)
        check_fields(self)
        if not METRICS_PREFIX.fullmatch(self.metrics_prefix):
            raise ConfigError(
                f"metrics_prefix is {self.metrics_prefix[:80]!r}, expected the beginning of a metric's name: 1 to 64 of "
                "ASCII letters, digits, '_' and ':', the first no digit"
            )
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path is {self.root_path!r}, expected a form like '/prefix'")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ConfigError("ssl_keyfile is set and ssl_certfile is not: a key needs its certificate")


def from_mapping(cls: type[T], values: Mapping[str, Any], source: str = "configuration") -> T:
    """A config of class `cls` from a mapping whose keys may use '-' or '_'. An unknown key is a ConfigError."""
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    cleaned = {str(k).replace("-", "_"): v for k, v in values.items()}
    unknown = sorted(set(cleaned) - known)
    if unknown:
        raise ConfigError(
            f"unknown key {', '.join(map(repr, unknown))} in {source}; known keys: {', '.join(sorted(known))}"
        )
    return cls(**cleaned)
