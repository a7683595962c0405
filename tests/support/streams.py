"""An `AsyncEngine` in tests: scenarios with a time limit, whole streams, and the check that nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from jinfer import AsyncEngine, EngineConfig, OutputDelta, SamplingParams
from tests.support.engines import SMALL

WAIT = 60.0  # seconds after which something hangs


def start(folder: Path, **options: Any) -> AsyncEngine:
    engine = AsyncEngine(EngineConfig(model=str(folder), **{**SMALL, **options}))
    engine.start()
    return engine


def play(scenario: Callable[[], Awaitable[Any]]) -> Any:
    """Runs a coroutine function; a scenario that hangs fails."""

    async def limited() -> Any:
        async with asyncio.timeout(WAIT):
            return await scenario()

    return asyncio.run(limited())


async def collect(
    engine: AsyncEngine, prompt: Sequence[int], params: SamplingParams, name: str, **options: Any
) -> list[OutputDelta]:
    """The deltas of a whole stream."""
    return [d async for d in engine.generate(prompt, params, request_id=name, **options)]


def tokens(deltas: Sequence[OutputDelta], index: int = 0) -> list[int]:
    return [t for d in deltas if d.index == index for t in d.token_ids]


async def check_idle(engine: AsyncEngine) -> None:
    """Nothing runs and every page is back, without the engine having had time to run much further."""
    await engine.check_integrity()  # behind whatever clean-up is queued
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert stats.recompiles == 0
