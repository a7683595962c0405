"""`AsyncEngine`: streams for asyncio callers, refusals, embeddings and other weights; see also its ends."""

import asyncio
import contextlib
import shutil

import numpy as np
import pytest

from jinfer import LLM, PoolingParams, RequestError, SamplingParams, load_params
from jinfer.errors import ModelError, QueueFullError, RequestFailedError
from jinfer.request import FinishReason
from tests.support.engines import SMALL, greedy
from tests.support.models import make_llama, random_prompt
from tests.support.streams import check_idle, collect, play, start, tokens

PROMPT = random_prompt(1, 20)
LONG = greedy(200)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("async")
    return [make_llama(root / f"model{seed}", seed=seed, scale=0.2) for seed in (1, 2)]


@pytest.fixture(scope="module")
def llm(folders):
    return LLM(str(folders[0]), **SMALL)


@pytest.fixture(scope="module")
def shared(folders):
    """For tests that leave it as it was."""
    engine = start(folders[0], max_num_waiting=16)
    yield engine
    engine.shutdown()
    assert not engine.is_healthy


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
        refused, served = results
        assert isinstance(refused, RequestError)
        assert "9999" in str(refused)
        assert not isinstance(served, BaseException)
        assert len(tokens(served)) == 3
        await check_idle(shared)

    play(scenario)


@pytest.mark.parametrize(
    ("prompt", "params", "options"),
    [
        (None, greedy(3), {}),
        (iter([1, 2]), greedy(3), {}),
        (PROMPT, greedy(3), {"pooling": "last"}),
        (PROMPT, greedy(3), {"priority": [1]}),
        (PROMPT, greedy(3), {"cache_salt": b"salt"}),
    ],
    ids=["no prompt", "iterator", "pooling", "priority", "salt"],
)
def test_what_no_check_foresaw_ends_that_request_alone(shared, prompt, params, options):
    """Faults of the caller's own code, which have no check of their own, must not reach the engine's loop."""

    async def scenario():
        await shared.wait_ready()
        served = asyncio.create_task(collect(shared, PROMPT, greedy(20), "good"))
        await asyncio.sleep(0)
        with pytest.raises((RequestError, RequestFailedError)):
            await collect(shared, prompt, params, "bad", **options)
        assert len(tokens(await served)) == 20
        assert shared.is_healthy
        await check_idle(shared)

    play(scenario)


# Other weights


def test_new_weights_between_two_steps(folders):
    own = start(folders[0])

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
    own.shutdown()
    other = LLM(str(folders[1]), **SMALL).generate(PROMPT, greedy(8))[0].token_ids
    assert new == other != old


# Embeddings


def test_embeddings_beside_streams(shared, llm):
    prompts = [random_prompt(400 + i, n) for i, n in enumerate((1, 30, 100))]
    vectors = [output.embedding for output in llm.embed(prompts, pooling="mean")]
    (offline,) = llm.generate(PROMPT, greedy(30))

    async def scenario():
        await shared.wait_ready()
        assert shared.embedding_size == len(vectors[0])
        text = asyncio.create_task(collect(shared, PROMPT, greedy(30), "text"))
        pooling = PoolingParams("mean")
        many = [shared.embed(p, pooling, request_id=f"e{i}") for i, p in enumerate(prompts)]
        found = await asyncio.gather(*many)
        (last,) = llm.embed(prompts[1])
        by_default = await shared.embed(prompts[1], request_id="default")
        np.testing.assert_allclose(by_default, last.embedding, atol=1e-5)
        assert tokens(await text) == offline.token_ids
        await check_idle(shared)
        return found

    for found, vector in zip(play(scenario), vectors, strict=True):
        np.testing.assert_allclose(found, vector, atol=1e-5)


def test_a_broken_pooling_config_is_told_at_the_start_and_harms_nothing_else(folders, tmp_path, caplog):
    folder = shutil.copytree(folders[0], tmp_path / "model")
    (folder / "modules.json").write_text("[1")
    own = start(folder)

    async def scenario():
        await own.wait_ready()
        assert "modules.json cannot be read as JSON" in caplog.text
        (folder / "modules.json").unlink()
        for _ in range(2):
            with pytest.raises(RequestError, match="modules.json cannot be read as JSON.*name the pooling"):
                await own.embed(PROMPT, request_id="e")
        assert (await own.embed(PROMPT, PoolingParams(), request_id="e")).shape == (own.embedding_size,)

    play(scenario)
    own.shutdown()


def test_an_embedding_can_be_cancelled_and_refused(shared):
    async def scenario():
        await shared.wait_ready()
        with pytest.raises(RequestError, match="prompt is empty"):
            await shared.embed([], request_id="bad")
        task = asyncio.create_task(shared.embed(random_prompt(1, 200), request_id="e"))
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await check_idle(shared)

    play(scenario)
