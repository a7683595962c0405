"""What an engine counts: prompts as they are processed, steps by their tokens, and what one request went through."""

import time

import pytest

from jinfer.request import RequestTimings
from jinfer.stats import STEP_TOKEN_BUCKETS, Counters
from tests.support.engines import check_idle, collect, greedy, run, run_choices, small_engine
from tests.support.models import random_prompt


@pytest.fixture(scope="module")
def engine(warm_llm):
    return warm_llm.engine


def grown(engine, before, *names):
    after = engine.stats()
    return tuple(getattr(after, name) - getattr(before, name) for name in names)


def test_a_prompt_counts_as_it_is_processed(engine):
    """32 tokens a step: of a prompt that is aborted in the queue nothing counts, of another one what was computed."""
    before = engine.stats()
    engine.add_request("part", random_prompt(900, 100), greedy(4))
    engine.step()
    engine.add_request("none", random_prompt(901, 50), greedy(4))
    for name in ("none", "part"):
        engine.abort(name)
    list(engine.drain())
    assert grown(engine, before, "prompt_tokens", "prompt_tokens_cached") == (32, 0)
    check_idle(engine)


def test_a_prompt_counts_once_for_all_choices_and_with_what_was_cached(engine):
    prompt = random_prompt(902, 50)
    before = engine.stats()
    run_choices(engine, {"one": (prompt, greedy(3, n=4))})
    assert grown(engine, before, "prompt_tokens", "prompt_tokens_cached", "generation_tokens") == (50, 0, 12)
    before = engine.stats()
    run(engine, {"again": (prompt, greedy(3))})
    assert grown(engine, before, "prompt_tokens", "prompt_tokens_cached") == (50, 48)


def test_what_is_computed_again_after_a_preemption_counts_once(tiny_llama):
    tight = small_engine(tiny_llama, num_gpu_blocks_override=33)
    prompts = {str(i): random_prompt(40 + i, 30) for i in range(4)}
    outputs = run(tight, {name: (prompt, greedy(60)) for name, prompt in prompts.items()})
    stats = tight.stats()
    assert stats.num_preemptions > 0
    assert stats.prompt_tokens == 120
    reported = [output.deltas[-1].num_preemptions for output in outputs.values()]
    assert sum(reported) == stats.num_preemptions


def test_steps_are_counted_by_their_tokens(engine):
    before = engine.stats()
    run(engine, {"one": (random_prompt(903, 40), greedy(5))})
    steps, tokens = before.step_tokens, engine.stats().step_tokens
    added = [b - a for a, b in zip(steps.counts, tokens.counts, strict=True)]
    assert tokens.buckets == STEP_TOKEN_BUCKETS
    # 32 and 8 tokens of the prompt, then a token a step; the first one came with the prompt's last chunk.
    assert dict(zip((*STEP_TOKEN_BUCKETS, "more"), added, strict=True)) == {
        **dict.fromkeys((*STEP_TOKEN_BUCKETS, "more"), 0),
        1: 4,
        8: 1,
        32: 1,
    }
    assert tokens.total - steps.total == 44
    assert sum(tokens.counts) == engine.stats().steps


def test_the_ends_of_the_buckets():
    counters = Counters()
    for count in (1, 2, 8, 9, 16384, 16385, 10**6):
        counters.count_step(count)
    assert counters.step_counts == [1, 2, 1, *[0] * 9, 1, 2]
    assert counters.step_total == 1 + 2 + 8 + 9 + 16384 + 16385 + 10**6


def test_the_spans_of_a_request(engine):
    engine.add_request("one", random_prompt(904, 40), greedy(5), arrival_time=time.monotonic() - 2)
    times = collect(engine.drain())["one", 0].deltas[-1].timings
    assert times is not None
    spans = (times.queue, times.prefill, times.decode, times.inference)
    assert all(span is not None and span > 0 for span in spans)
    queue, prefill, decode, inference = (span or 0.0 for span in spans)
    assert queue >= 2
    assert prefill + decode == pytest.approx(inference)
    assert queue + inference == pytest.approx((times.finished or 0.0) - times.arrival)
    assert RequestTimings(5.0, None, None, 7.0).inference is None


def test_the_caches_facts(engine):
    facts = engine.stats().cache_config
    assert all(isinstance(value, str) for value in facts.values())
    assert facts["block_size"] == "8"
    assert facts["cache_dtype"] == "float32"
    assert facts["enable_prefix_caching"] == "True"
    (group,) = engine.kv_plan.groups
    assert int(facts["num_gpu_blocks"]) == group.pages - 1
