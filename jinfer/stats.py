"""What an engine counts, and the snapshots of it that others read."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jinfer.config import EngineConfig
from jinfer.request import FinishReason

if TYPE_CHECKING:
    from jinfer.kv_plan import KVPlan
    from jinfer.schedule.scheduler import Scheduler

# Upper bounds of the buckets in which steps are counted by their tokens; one more bucket takes what is above.
STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class StepTokens:
    """Steps by the tokens they computed, of prompts and of outputs together.

    counts[i]: steps with more than buckets[i - 1] and at most buckets[i] tokens; the last: with more than all of them.
    total: tokens of all steps.
    """

    buckets: tuple[int, ...]
    counts: tuple[int, ...]
    total: int


@dataclass(frozen=True)
class KVGroupStats:
    """One page group: its layers' window (None: full attention), its pool's bytes, and the share of it in use."""

    window: int | None
    num_layers: int
    num_bytes: int
    usage: float


@dataclass(frozen=True)
class EngineStats:
    """A snapshot; counters grow from the engine's start. kv_cache_usage is a share of 1 (of the fullest page group),
    tokens are counts."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    # Prompt tokens that steps have computed or the prefix cache had, each once however many choices share them.
    prompt_tokens: int
    prompt_tokens_cached: int  # those of them that the prefix cache had
    generation_tokens: int
    num_preemptions: int
    recompiles: int
    num_requests_finished: dict[str, int]
    num_not_finite: int  # choices that ended with an error because their logits or vectors were not finite
    steps: int
    step_tokens: StepTokens
    # Wall time of schedule, pack, dispatch, commit, detokenize; not waiting for the device.
    host_seconds: float
    # CPU time of the same: on a CPU backend the device's threads take the cores from under the wall time.
    host_cpu_seconds: float
    wait_seconds: float  # waiting for the device's tokens
    kv_waste: float  # share of the allocated KV room that held no token, over all steps
    kv_groups: tuple[KVGroupStats, ...]
    # KV bytes that a sequence of max_model_len tokens holds, as a share of what it held without windows.
    kv_fraction: float
    # What never changes, as text: block_size, num_gpu_blocks, cache_dtype, enable_prefix_caching and so on.
    cache_config: dict[str, str]


@dataclass
class Counters:
    """What the engine itself counts; the scheduler and the runner keep their own."""

    generation_tokens: int = 0
    not_finite: int = 0
    steps: int = 0
    host_seconds: float = 0.0
    host_cpu_seconds: float = 0.0
    wait_seconds: float = 0.0
    finished: dict[str, int] = field(default_factory=lambda: {r.value: 0 for r in FinishReason})
    step_counts: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKEN_BUCKETS) + 1))
    step_total: int = 0

    def count_step(self, num_tokens: int) -> None:
        """One more step was dispatched, of so many tokens."""
        self.steps += 1
        self.step_counts[bisect_left(STEP_TOKEN_BUCKETS, num_tokens)] += 1
        self.step_total += num_tokens

    @property
    def step_tokens(self) -> StepTokens:
        return StepTokens(STEP_TOKEN_BUCKETS, tuple(self.step_counts), self.step_total)


def snapshot(
    scheduler: Scheduler, counters: Counters, plan: KVPlan, recompiles: int, cache_config: dict[str, str]
) -> EngineStats:
    """What the parts of an engine have counted until now."""
    s, c = scheduler, counters
    allocated = s.allocated_tokens
    groups = (
        KVGroupStats(
            part.kind.window, len(part.layers), part.num_bytes, group.pool.num_used / group.pool.num_total
        )
        for part, group in zip(plan.groups, s.groups, strict=True)
    )
    return EngineStats(
        num_running=s.num_running,
        num_waiting=s.num_waiting,
        kv_cache_usage=s.kv_usage,
        prefix_cache_queries=s.prefix_queries,
        prefix_cache_hits=s.prefix_hits,
        prompt_tokens=s.prompt_tokens,
        prompt_tokens_cached=s.prompt_tokens_cached,
        generation_tokens=c.generation_tokens,
        num_preemptions=s.preemptions,
        recompiles=recompiles,
        num_requests_finished=dict(c.finished),
        num_not_finite=c.not_finite,
        steps=c.steps,
        step_tokens=c.step_tokens,
        host_seconds=c.host_seconds,
        host_cpu_seconds=c.host_cpu_seconds,
        wait_seconds=c.wait_seconds,
        kv_waste=1 - s.used_tokens / allocated if allocated else 0.0,
        kv_groups=tuple(groups),
        kv_fraction=plan.fraction,
        cache_config=cache_config,
    )


def describe_cache(config: EngineConfig, plan: KVPlan, dtype: str) -> dict[str, str]:
    """The facts of `EngineStats.cache_config`; dtype: of the numbers in the pages."""
    windows = [group.kind.window for group in plan.groups if group.kind.window is not None]
    facts = {
        "block_size": plan.page_size,
        "num_gpu_blocks": max(group.pages for group in plan.groups) - 1,  # without the null page
        "num_gpu_blocks_override": config.num_gpu_blocks_override,
        "cache_dtype": dtype,
        "kv_cache_memory_bytes": plan.num_bytes,
        "enable_prefix_caching": config.enable_prefix_caching,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "sliding_window": min(windows, default=None),
        "max_model_len": plan.max_model_len,
    }
    return {name: str(value) for name, value in facts.items()}
