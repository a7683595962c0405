"""How an `AsyncEngine` starts, fails, drains and is shut down: no way leaves pages or callers behind."""

import asyncio
import logging
import threading
import time

import pytest

from jinfer import EngineDeadError, SamplingParams
from jinfer.errors import ModelError
from jinfer.request import FinishReason
from tests.support.engines import greedy
from tests.support.models import make_llama, random_prompt
from tests.support.streams import WAIT, check_idle, collect, play, start, tokens

PROMPT = random_prompt(1, 20)
LONG = greedy(200)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [make_llama(tmp_path_factory.mktemp("ends") / "model", seed=1, scale=0.2)]


@pytest.fixture
def own(folders):
    """For tests that end it."""
    engine = start(folders[0])
    yield engine
    engine.shutdown()


# The engine's own faults


@pytest.mark.parametrize("fault", ["dispatch", "schedule"])
def test_a_failing_engine_ends_every_stream(own, monkeypatch, caplog, fault):
    async def scenario():
        await own.wait_ready()
        streams = [own.generate(PROMPT, LONG, request_id=f"f{i}") for i in range(6)]
        await asyncio.gather(*(anext(s) for s in streams[:4]))
        waiting = [asyncio.create_task(anext(s)) for s in streams[4:]]  # these have no slot
        await asyncio.sleep(0)

        def broken(*_):
            raise OSError("the device is gone")

        target = own.engine.runner if fault == "dispatch" else own.engine.scheduler
        monkeypatch.setattr(target, fault, broken)
        for stream in streams[:4]:
            with pytest.raises(EngineDeadError, match="the device is gone"):
                async for _ in stream:
                    pass
        for task in waiting:
            with pytest.raises(EngineDeadError, match="the device is gone"):
                await task
        assert not own.is_healthy
        assert not own.is_ready
        assert "the device is gone" in (own.error or "")
        # Whoever comes later is told at once.
        for later in (collect(own, PROMPT, LONG, "later"), own.abort("f0"), own.check_integrity()):
            with pytest.raises(EngineDeadError, match="the device is gone"):
                await later
        # A drain has nothing left to wait for.
        await own.drain(30.0)

    with caplog.at_level(logging.CRITICAL, "jinfer"):
        play(scenario)
    own.shutdown()  # returns when the thread has closed the books
    stats = own.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    own.engine.check_integrity()


def test_shutdown_ends_streams_and_later_calls(own):
    async def scenario():
        await own.wait_ready()
        stream = own.generate(PROMPT, LONG, request_id="r")
        await anext(stream)
        await asyncio.to_thread(own.shutdown)
        with pytest.raises(EngineDeadError, match="shut down"):
            async for _ in stream:
                pass
        with pytest.raises(EngineDeadError, match="shut down"):
            await collect(own, PROMPT, LONG, "later")

    play(scenario)
    assert not own.is_healthy
    assert own.error is None
    own.engine.check_integrity()


def test_a_step_that_never_ends_is_noticed(own, monkeypatch):
    async def scenario():
        assert own.stalled_seconds == 0.0
        await own.wait_ready()
        await collect(own, PROMPT, greedy(3), "warm")
        stuck, runner = threading.Event(), own.engine.runner
        real = runner.dispatch

        def dispatch(batch):
            stuck.wait(WAIT)
            return real(batch)

        await check_idle(own)
        assert own.stalled_seconds < 1.0
        monkeypatch.setattr(runner, "dispatch", dispatch)
        task = asyncio.create_task(collect(own, PROMPT, greedy(3), "stuck"))
        while own.stalled_seconds < 0.2:
            await asyncio.sleep(0.01)
        with runner.preparing():  # a compilation may take its time
            assert own.stalled_seconds == 0.0
        assert own.stalled_seconds < 0.2
        stuck.set()
        assert len(tokens(await task)) == 3
        await check_idle(own)
        while own.stalled_seconds:  # idle again
            await asyncio.sleep(0.01)

    play(scenario)
    own.shutdown()
    assert own.stalled_seconds == 0.0


# Draining


def test_drain_lets_running_requests_end(own):
    async def scenario():
        await own.wait_ready()
        task = asyncio.create_task(collect(own, PROMPT, greedy(60), "running"))
        await asyncio.sleep(0)
        drain = asyncio.create_task(own.drain(WAIT))
        await asyncio.sleep(0)
        assert not own.is_ready
        assert own.is_healthy
        with pytest.raises(EngineDeadError, match="takes no more requests"):
            await collect(own, PROMPT, LONG, "late")
        await drain
        deltas = await task
        assert len(tokens(deltas)) == 60
        assert deltas[-1].finish_reason is FinishReason.LENGTH
        await check_idle(own)

    play(scenario)


def test_drain_aborts_what_takes_too_long(own, monkeypatch):
    async def scenario():
        await own.wait_ready()
        real = own.engine.runner.dispatch

        def slow(batch):
            time.sleep(0.02)
            return real(batch)

        monkeypatch.setattr(own.engine.runner, "dispatch", slow)
        # The last two wait for a slot all the time.
        tasks = [asyncio.create_task(collect(own, PROMPT, LONG, f"r{i}")) for i in range(6)]
        await asyncio.sleep(0)
        begin = time.monotonic()
        await own.drain(0.5)
        assert 0.5 <= time.monotonic() - begin < 4.0  # 200 steps take longer
        for task in tasks:
            deltas = await task
            assert deltas[-1].finish_reason is FinishReason.ABORT
            assert len(tokens(deltas)) < 200
        await check_idle(own)

    play(scenario)


# Starting


def test_a_missing_model_is_told_to_whoever_waits(tmp_path):
    engine = start(tmp_path / "nowhere")

    async def scenario():
        for _ in range(2):
            with pytest.raises(ModelError, match="nowhere"):
                await engine.wait_ready()
        with pytest.raises(EngineDeadError, match="could not start"):
            await collect(engine, PROMPT, LONG, "r")
        with pytest.raises(EngineDeadError, match="could not start"):
            engine.stats()
        await engine.drain(1.0)

    play(scenario)
    assert not engine.is_healthy
    assert not engine.is_ready
    assert "nowhere" in (engine.error or "")
    engine.shutdown()


def test_requests_sent_while_it_loads_are_served_then(own):
    async def scenario():
        deltas = await collect(own, PROMPT, greedy(4), "early")
        assert len(tokens(deltas)) == 4
        assert own.is_ready

    play(scenario)


def test_nothing_compiles_while_serving(folders):
    engine = start(folders[0], warmup=True)

    async def scenario():
        await engine.wait_ready()
        kinds = [
            greedy(9, n=2),
            greedy(5, prompt_logprobs=1, logprobs=1),
            SamplingParams(
                seed=1, repetition_penalty=1.2, logit_bias={3: 1.0}, stop_token_ids=(9,), min_tokens=3
            ),
        ]
        requests = [(random_prompt(i, 1 + 9 * i), kinds[i % 3]) for i in range(9)]
        await asyncio.gather(*(collect(engine, *r, f"w{i}") for i, r in enumerate(requests)))
        await check_idle(engine)  # its recompiles are 0

    play(scenario)
    engine.shutdown()
