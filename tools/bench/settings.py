"""What a benchmark can be told: the dataclasses behind its flags and its YAML presets."""

from __future__ import annotations

from dataclasses import dataclass

from jinfer import ConfigError
from jinfer.config import check_fields, option

SLO_NAMES = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Workload:
    """Greedy requests of random content. Lengths, content and arrivals follow from `workload_seed` alone."""

    num_requests: int = option(32, "requests of one run", low=1, high=10**6)
    prompt_len: str = option("16:256", "prompt tokens, uniform from LOW:HIGH, or one number")
    output_len: str = option("16:128", "output tokens, in the same form")
    shared_prefix_len: int = option(
        0, "tokens put in front of every prompt, the same for all requests of a run", low=0, high=10**6
    )
    workload_seed: int = option(0, "seed of lengths, content and arrivals", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        check_fields(self)
        parse_span("prompt_len", self.prompt_len)
        parse_span("output_len", self.output_len)

    @property
    def longest(self) -> int:
        """Tokens of the longest request that may come, prompt and output together."""
        prompt, output = parse_span("prompt_len", self.prompt_len), parse_span("output_len", self.output_len)
        return self.shared_prefix_len + prompt[1] + output[1]


@dataclass(frozen=True)
class StreamWorkload(Workload):
    """The same, with the defaults of single-stream work."""

    num_requests: int = option(4, "requests of one run, one after the other", low=1, high=10**6)
    prompt_len: str = option("128", "prompt tokens, uniform from LOW:HIGH, or one number")
    output_len: str = option("128", "output tokens, in the same form")


@dataclass(frozen=True)
class Measurement:
    """How often, and where the results go."""

    repeats: int = option(3, "measured runs of each system; medians are reported", low=1, high=1000)
    json: str | None = option(None, "file for every figure as JSON")
    plot: str | None = option(None, "file for a picture, as PNG")
    min_ratio: float | None = option(
        None, "goal for output tokens/s as a multiple of the compared system's; missed: exit status 1", low=0
    )
    min_tokens_per_second: float | None = option(None, "goal for output tokens/s; likewise", low=0)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("json", "plot"):
            value = getattr(self, name)
            if value is not None and not value:
                raise ConfigError(f"{name} is empty, expected a file name")


@dataclass(frozen=True)
class EngineMeasurement(Measurement):
    """What only an engine in this process can be asked."""

    compare: str | None = option(
        None, "hf: run the same requests through transformers' generate, alternating, in this process"
    )
    hf_threads: int | None = option(None, "torch's threads; default: all cores", low=1, high=4096)
    max_host_ms: float | None = option(
        None, "goal for host milliseconds per step with most rows running; missed: exit status 1", low=0
    )
    max_kv_waste: float | None = option(
        None, "goal for the share of KV room that holds no token", low=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare is not None and self.compare != "hf":
            raise ConfigError(
                f"compare is {self.compare!r}, expected 'hf': another server is compared by "
                "`python -m tools.bench serve --compare URL`, so that both sides are reached over HTTP"
            )
        if self.min_ratio is not None and self.compare is None:
            raise ConfigError("min_ratio needs something to compare with: give compare too")

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Static batches that transformers is tried with: one request at a time leaves no choice."""
        return (1,)


@dataclass(frozen=True)
class OfflineMeasurement(EngineMeasurement):
    """Many requests can be batched in more than one way."""

    hf_batch_sizes: str = option(
        "8,32", "static batches that transformers is tried with; the best one counts"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_batch_sizes(self.hf_batch_sizes)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return parse_batch_sizes(self.hf_batch_sizes)


@dataclass(frozen=True)
class Load:
    """Which server, and how requests reach it."""

    url: str | None = option(
        None, "OpenAI-compatible server to measure; default: start jinfer.serve on a free port"
    )
    model: str | None = option(
        None,
        "model that jinfer.serve is started with (random:9m and random:100m are made on the spot); with --url: the "
        "folder that tells the vocabulary, so that prompts are sent as token ids",
    )
    served_model_name: str | None = option(None, "name of the model in the API; default: the server's first")
    compare_model_name: str | None = option(None, "the same for the server of --compare")
    server_args: str = option("", "flags for the jinfer.serve that is started, as one string")
    compare: str | None = option(None, "URL of another server, measured alternately with the same requests")
    api_key: str | None = option(None, "bearer token for both servers")
    endpoint: str = option("completions", "API that is called", choices=("completions", "chat"))
    prompt_kind: str = option(
        "auto",
        "what prompts are sent as; auto: token ids if the vocabulary is known and the endpoint takes them",
        choices=("auto", "tokens", "text"),
    )
    ignore_eos: bool = option(True, "ask for exactly the output length; off for servers without that field")
    request_rate: float | None = option(
        None, "requests per second, Poisson arrivals; default: all at once", low=1e-6, high=1e6
    )
    concurrency: int | None = option(
        None, "requests in flight: one that ends starts the next", low=1, high=10**5
    )
    slo: str | None = option(None, "limits in milliseconds for goodput, as ttft:500,tpot:50,e2e:10000")
    request_timeout: float = option(
        600.0, "seconds after which a request counts as failed", low=0.1, high=86400
    )
    start_timeout: float = option(600.0, "seconds that a started server gets to be ready", low=1, high=86400)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("url", "compare"):
            value = getattr(self, name)
            if value is not None and not value.startswith(("http://", "https://")):
                raise ConfigError(
                    f"{name} is {value!r}, expected the URL of a server, as http://localhost:8000"
                )
        if self.request_rate is not None and self.concurrency is not None:
            raise ConfigError("request_rate and concurrency are both given: choose one")
        if self.url is not None and self.server_args:
            raise ConfigError("server_args are for a server that is started here: leave out url, or them")
        if self.prompt_kind == "tokens" and self.endpoint == "chat":
            raise ConfigError(
                "prompt_kind is tokens, and the chat endpoint takes text: use endpoint completions"
            )
        if self.prompt_kind == "tokens" and self.url is not None and self.model is None:
            raise ConfigError("prompt_kind tokens needs model, the folder that tells the vocabulary")
        if self.compare_model_name is not None and self.compare is None:
            raise ConfigError("compare_model_name needs compare, the other server's URL")
        parse_slo(self.slo)

    @property
    def sends_tokens(self) -> bool:
        if self.prompt_kind == "auto":
            return self.endpoint == "completions" and (self.url is None or self.model is not None)
        return self.prompt_kind == "tokens"


@dataclass(frozen=True)
class Crowd:
    """Connections that hold a place and ask for nothing."""

    url: str | None = option(
        None, "server to try, plain HTTP without a key; default: start jinfer.serve on a free port"
    )
    server_args: str = option("", "flags for the jinfer.serve that is started, as one string")
    idle: int = option(2000, "connections that were answered and say no more", low=0, high=10**6)
    half_open: int = option(10000, "connections that have sent a part of their headers", low=0, high=10**6)
    probes: int = option(100, "requests that are measured before, beside and after them", low=1, high=10**5)
    patience: float = option(
        100.0, "seconds in which the server has to close them, and to answer a probe", low=1, high=86400
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.url is not None and not self.url.startswith("http://"):
            raise ConfigError(f"url is {self.url!r}, expected the URL of a server, as http://localhost:8000")


@dataclass(frozen=True)
class ModelSettings:
    """A random-weight model as a folder, for this and for other systems."""

    size: str = option("100m", "9m or 100m")
    out: str | None = option(None, "folder to write")
    weights_seed: int = option(0, "seed of the weights", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.out is None:
            raise ConfigError("out is missing: name the folder to write")


def parse_span(name: str, text: str) -> tuple[int, int]:
    """'16:256' as (16, 256), '64' as (64, 64). Raises ConfigError."""
    low, colon, high = text.partition(":")
    try:
        span = int(low), int(high if colon else low)
    except ValueError:
        span = (0, 0)
    if not 1 <= span[0] <= span[1] <= 10**7:
        raise ConfigError(f"{name} is {text!r}, expected LOW:HIGH or one number, from 1 up, as 16:256")
    return span


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """'8,32' as (8, 32). Raises ConfigError."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ConfigError(f"hf_batch_sizes is {text!r}, expected different whole numbers, as 8,32")
    return sizes


def parse_slo(text: str | None) -> dict[str, float]:
    """'ttft:500,tpot:50' as {'ttft': 0.5, 'tpot': 0.05}, in seconds. Raises ConfigError."""
    limits: dict[str, float] = {}
    for part in text.split(",") if text is not None else ():
        name, _, value = part.strip().partition(":")
        try:
            limit = float(value) / 1000
        except ValueError:
            limit = 0.0
        if name not in SLO_NAMES or name in limits or not 0 < limit < float("inf"):
            raise ConfigError(
                f"slo is {text!r}, expected milliseconds for any of {', '.join(SLO_NAMES)}, as ttft:500,tpot:50"
            )
        limits[name] = limit
    return limits
