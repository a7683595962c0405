"""`AsyncEngine`: streams for asyncio callers, and that no way of ending one leaves pages or callers behind."""

import asyncio
import contextlib
import logging
import time
from typing import Any

import pytest

from jinfer import LLM, AsyncEngine, EngineConfig, EngineDeadError, RequestError, SamplingParams, load_params
from jinfer.errors import ModelError, QueueFullError
from jinfer.request import FinishReason
from tests.support.engines import SMALL, greedy
from tests.support.models import make_llama, random_prompt

PROMPT = random_prompt(1, 20)
LONG = greedy(200)
WAIT = 60.0  # seconds after which something hangs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("async")
    return [make_llama(root / f"model{seed}", seed=seed, scale=0.2) for seed in (1, 2)]


@pytest.fixture(scope="module")
def llm(folders):
    return LLM(str(folders[0]), **SMALL)


def start(folder, **options):
    engine = AsyncEngine(EngineConfig(model=str(folder), **{**SMALL, **options}))
    engine.start()
    return engine


@pytest.fixture(scope="module")
def shared(folders):
    """For tests that leave it as it was."""
    engine = start(folders[0], max_num_waiting=16)
    yield engine
    engine.shutdown()
    assert not engine.is_healthy


@pytest.fixture
def own(folders):
    """For tests that end it."""
    engine = start(folders[0])
    yield engine
    engine.shutdown()


def play(scenario) -> Any:
    """Runs a coroutine function; a scenario that hangs fails."""

    async def limited() -> Any:
        async with asyncio.timeout(WAIT):
            return await scenario()

    return asyncio.run(limited())


async def collect(engine, prompt, params, name, **options):
    """The deltas of a whole stream."""
    return [d async for d in engine.generate(prompt, params, request_id=name, **options)]


def tokens(deltas, index=0):
    return [t for d in deltas if d.index == index for t in d.token_ids]


async def check_idle(engine):
    """Nothing runs and every page is back, without the engine having had time to run much further."""
    await engine.check_integrity()  # behind whatever clean-up is queued
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert stats.recompiles == 0


# Streams


def test_concurrent_streams_are_what_the_offline_engine_gives(shared, llm):
    prompts = [random_prompt(100 + i, 3 + 5 * i) for i in range(12)]
    kinds = [
        greedy(20),
        SamplingParams(temperature=1.5, seed=5, max_tokens=15, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=1.0, seed=6, n=2, max_tokens=9, top_k=30),
    ]
    many = [kinds[i % 3] for i in range(12)]
    offline = llm.generate(prompts, many)

    async def scenario():
        await shared.wait_ready()
        streams = [
            collect(shared, *request, f"s{i}") for i, request in enumerate(zip(prompts, many, strict=True))
        ]
        results = await asyncio.gather(*streams)
        await check_idle(shared)
        return results

    for deltas, output in zip(play(scenario), offline, strict=True):
        for choice in output.outputs:
            mine = [d for d in deltas if d.index == choice.index]
            assert tokens(deltas, choice.index) == choice.token_ids
            assert "".join(d.text for d in mine) == choice.text
            assert [d.finish_reason is None for d in mine] == [True] * (len(mine) - 1) + [False]
            assert mine[-1].finish_reason.value == choice.finish_reason
            assert len(mine) >= len(choice.token_ids)  # a delta per token: it streams


def test_facts_come_from_the_model(shared, folders):
    async def scenario():
        await shared.wait_ready()

    play(scenario)
    assert shared.is_ready
    assert shared.is_healthy
    assert shared.error is None
    assert (shared.max_model_len, shared.vocab_size) == (256, 300)
    assert shared.model_name == str(folders[0])
    assert shared.tokenizer.decode(shared.tokenizer.encode("abc")) == "abc"
    assert shared.chat_template is not None
    shared.validate(PROMPT, greedy(1))
    with pytest.raises(RequestError, match="prompt is empty"):
        shared.validate([], greedy(1))


def test_two_event_loops_use_one_engine(shared, llm):
    (offline,) = llm.generate(PROMPT, greedy(10))

    async def both():
        await shared.wait_ready()
        elsewhere = asyncio.to_thread(asyncio.run, collect(shared, PROMPT, greedy(10), "there"))
        return await asyncio.gather(elsewhere, collect(shared, PROMPT, greedy(10), "here"))

    for deltas in play(both):
        assert tokens(deltas) == offline.token_ids


# Leaving early


@pytest.mark.parametrize("n", [1, 3])
def test_closing_a_stream_frees_its_pages_at_once(shared, n):
    async def scenario():
        await shared.wait_ready()
        stream = shared.generate(PROMPT, greedy(200, n=n), request_id="closed")
        seen = [await anext(stream) for _ in range(3 * n)]
        assert not any(d.finish_reason for d in seen)
        assert shared.stats().kv_cache_usage > 0
        ended = shared.stats().num_requests_finished["abort"]
        await stream.aclose()
        await check_idle(shared)
        assert shared.stats().num_requests_finished["abort"] == ended + n
        # The id is free again, and no delta of the old request reaches the new one.
        again = await collect(shared, PROMPT, greedy(5), "closed")
        assert len(tokens(again)) == 5
        assert again[-1].finish_reason is FinishReason.LENGTH

    play(scenario)


def test_a_break_from_the_loop_aborts(shared):
    async def scenario():
        await shared.wait_ready()
        async with contextlib.aclosing(shared.generate(PROMPT, LONG, request_id="broken")) as stream:
            async for _ in stream:
                break
        await check_idle(shared)

    play(scenario)


def test_cancelling_the_consumer_frees_pages_at_once(shared, llm):
    (offline,) = llm.generate(PROMPT[:9], greedy(30))

    async def scenario():
        await shared.wait_ready()
        started = asyncio.Event()

        async def consume():
            async for _ in shared.generate(PROMPT, LONG, request_id="cancelled"):
                started.set()

        # One is cancelled while it streams, one before its request has been taken, and one goes on.
        bystander = asyncio.create_task(collect(shared, PROMPT[:9], greedy(30), "bystander"))
        task = asyncio.create_task(consume())
        await started.wait()
        early = asyncio.create_task(collect(shared, PROMPT, LONG, "early"))
        await asyncio.sleep(0)
        for cancelled in (task, early):
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
        assert tokens(await bystander) == offline.token_ids
        await check_idle(shared)

    play(scenario)


def test_abort_ends_a_stream_with_a_last_delta(shared):
    async def scenario():
        await shared.wait_ready()
        stream = shared.generate(PROMPT, LONG, request_id="aborted")
        await anext(stream)
        await shared.abort("aborted")
        await shared.abort("unknown")
        rest = [d async for d in stream]
        assert rest[-1].finish_reason is FinishReason.ABORT
        await check_idle(shared)

    play(scenario)


# Refusals


def test_a_full_queue_refuses_and_serves_on(shared):
    async def scenario():
        await shared.wait_ready()
        # Many more than slots and queue hold, all at once.
        names = [f"q{i}" for i in range(40)]
        results = await asyncio.gather(
            *(collect(shared, PROMPT, greedy(12), name) for name in names), return_exceptions=True
        )
        refused = [r for r in results if isinstance(r, BaseException)]
        assert refused
        assert all(isinstance(r, QueueFullError) for r in refused)
        served = [tokens(r) for r in results if not isinstance(r, BaseException)]
        assert len(served) >= 16
        assert all(t == served[0] for t in served)
        await check_idle(shared)

    play(scenario)


def test_a_running_id_is_refused_and_its_owner_goes_on(shared):
    async def scenario():
        await shared.wait_ready()
        stream = shared.generate(PROMPT, greedy(30), request_id="same")
        first = await anext(stream)
        with pytest.raises(RequestError, match="'same' is running already"):
            await collect(shared, PROMPT, greedy(3), "same")
        assert len(tokens([first, *[d async for d in stream]])) == 30
        await check_idle(shared)

    play(scenario)


def test_a_bad_request_is_refused_alone(shared):
    async def scenario():
        await shared.wait_ready()
        bad = collect(shared, [5, 9999], greedy(3), "bad")
        results = await asyncio.gather(
            bad, collect(shared, PROMPT, greedy(3), "good"), return_exceptions=True
        )
        assert isinstance(results[0], RequestError)
        assert "9999" in str(results[0])
        assert len(tokens(results[1])) == 3
        await check_idle(shared)

    play(scenario)


# Other weights


def test_new_weights_between_two_steps(own, folders):
    async def scenario():
        await own.wait_ready()
        old = tokens(await collect(own, PROMPT, greedy(8), "old"))
        running = asyncio.create_task(collect(own, PROMPT, LONG, "running"))
        await own.update_weights(load_params(str(folders[1])))
        new = tokens(await collect(own, PROMPT, greedy(8), "new"))
        with pytest.raises(ModelError):
            await own.update_weights({})  # type: ignore[arg-type]
        assert len(tokens(await running)) == 200
        await check_idle(own)
        return old, new

    old, new = play(scenario)
    other = LLM(str(folders[1]), **SMALL).generate(PROMPT, greedy(8))[0].token_ids
    assert new == other != old


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
