"""Requests through an engine, and the checks that every scenario ends with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinfer import Engine, EngineConfig, OutputDelta, SamplingParams

# Few buckets, so few programs; every test that can uses these sizes and finds them in the compile cache.
SMALL: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "max_model_len": 256,
    "warmup": False,
    "optimization_level": 0,  # compiles in half the time; `served_engine` compiles as a server does
}


def small_engine(folder: Path, **options: Any) -> Engine:
    """An engine that compiles only the steps it meets."""
    return Engine(EngineConfig(model=str(folder), **{**SMALL, **options}))


def greedy(max_tokens: int = 64, **values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **values})


def served_engine(folder: Path, **options: Any) -> Engine:
    """The same with programs as they are served."""
    return small_engine(folder, **{"optimization_level": None, **options})


@dataclass
class Output:
    """All deltas of one choice, put together."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached: int = 0
    deltas: list[OutputDelta] = field(default_factory=list)

    def add(self, delta: OutputDelta) -> None:
        assert self.finish_reason is None, "a delta after the last one"
        self.deltas.append(delta)
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.num_cached = delta.num_cached_tokens
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason.value, delta.stop_reason


def collect(deltas: Iterable[OutputDelta]) -> dict[tuple[str, int], Output]:
    """Outputs by request id and choice."""
    outputs: dict[tuple[str, int], Output] = {}
    for delta in deltas:
        outputs.setdefault((delta.request_id, delta.index), Output()).add(delta)
    return outputs


def run(engine: Engine, requests: Mapping[str, tuple[Sequence[int], SamplingParams]]) -> dict[str, Output]:
    """Runs requests together; first choice of each. Afterwards nothing may be left behind."""
    return {name: output for (name, index), output in run_choices(engine, requests).items() if index == 0}


def run_choices(
    engine: Engine, requests: Mapping[str, tuple[Sequence[int], SamplingParams]]
) -> dict[tuple[str, int], Output]:
    """Runs requests together; every choice."""
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)
    outputs = collect(engine.drain())
    check_idle(engine)
    for name, (_, params) in requests.items():
        for index in range(params.n):
            assert outputs[name, index].finish_reason is not None
    return outputs


def run_one(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> Output:
    return run(engine, {"one": (prompt, params)})["one"]


def check_idle(engine: Engine) -> None:
    """Nothing runs, the books balance, every page is back, and nothing was compiled while serving."""
    assert not engine.has_unfinished
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert stats.recompiles == 0
