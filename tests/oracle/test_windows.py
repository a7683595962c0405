"""Models with sliding windows keep less KV and give the tokens that transformers gives, whatever the engine does.

Windows shorter than a page (8 tokens), longer than one, longer than the prompt, and windows in all layers or in some.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer import Engine, SamplingParams
from jinfer.cache.groups import PageGroup
from tests.support.engines import Output, check_idle, collect, greedy, run, run_choices, run_one, small_engine
from tests.support.families import CLEAR_MARGIN, SEEDS
from tests.support.models import hf_greedy, make_model, margin, random_prompt

SLIDING, FULL = "sliding_attention", "full_attention"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # Five layers with a window to one without, as published; the window is two pages and a half.
    "five to one": (
        "gemma3_text",
        {"num_hidden_layers": 6, "sliding_window": 20, "head_dim": 16, "query_pre_attn_scalar": 16},
    ),
    # No layer that keeps everything, and a window shorter than a page.
    "all": ("mistral", {"num_hidden_layers": 2, "sliding_window": 5, "head_dim": 12}),
    # Two layers each way, a window of a whole number of pages.
    "some": (
        "qwen2",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 2,
        },
    ),
}
LENGTHS = (1, 3, 21, 90, 130)
PROMPTS = {str(n): random_prompt(900 + n, n) for n in LENGTHS}
NEW = 40

Expected = dict[str, list[int]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By kind: a folder, and what transformers generates."""

    @functools.cache
    def make(kind: str) -> tuple[Path, Expected]:
        model_type, config = KINDS[kind]
        for seed in range(SEEDS):
            folder = make_model(
                model_type, tmp_path_factory.mktemp("windows"), seed=seed, scale=0.2, **config
            )
            results = {name: hf_greedy(folder, prompt, NEW) for name, prompt in PROMPTS.items()}
            if min(margin(logits) for _, logits in results.values()) > CLEAR_MARGIN:
                return folder, {name: tokens for name, (tokens, _) in results.items()}
        raise AssertionError("no seed gives clear choices")

    return make


@pytest.fixture(scope="module", params=KINDS)
def shared(request, models) -> tuple[Engine, Expected]:
    folder, expected = models(request.param)
    return small_engine(folder), expected


@pytest.fixture
def engine(shared) -> Engine:
    """One engine for many tests, its cache empty."""
    check_idle(shared[0])
    shared[0].scheduler.reset_prefix_cache()
    return shared[0]


@pytest.fixture
def expected(shared) -> Expected:
    return shared[1]


def requests(*names: str) -> dict[str, tuple[list[int], SamplingParams]]:
    return {name: (PROMPTS[name], greedy(NEW)) for name in names or PROMPTS}


def assert_expected(outputs: dict[str, Output], expected: Expected) -> None:
    for name, output in outputs.items():
        assert output.token_ids == expected[name], f"prompt of {name}"


def assert_clear_part(folder: Path, prompt: list[int], output: Output) -> None:
    """The tokens are those of transformers up to its first choice that is a near tie."""
    count = len(output.token_ids)
    tokens, logits = hf_greedy(folder, prompt, count)
    clear = next((i for i in range(count) if margin(logits[i : i + 1]) < CLEAR_MARGIN), count)
    assert clear > 4
    assert output.token_ids[:clear] == tokens[:clear]


def windowed(engine: Engine) -> PageGroup:
    return next(group for group in engine.scheduler.groups if group.window is not None)


def test_chunked_and_cached(engine, expected):
    """Prompts in chunks of 16; then again, with all full pages but the last one's found."""
    cold = run(engine, requests())
    assert_expected(cold, expected)
    assert [output.num_cached for output in cold.values()] == [0] * len(LENGTHS)
    warm = run(engine, requests())
    assert_expected(warm, expected)
    assert [output.num_cached for output in warm.values()] == [(n - 1) // 8 * 8 for n in LENGTHS]


def test_a_turn_of_a_conversation_finds_the_last_one(engine):
    first = run_one(engine, PROMPTS["90"], greedy(NEW))
    longer = [*PROMPTS["90"], *first.token_ids, *random_prompt(7, 9)]
    warm = run_one(engine, longer, greedy(NEW))
    assert warm.num_cached == (90 + NEW - 1) // 8 * 8
    assert_clear_part(engine.folder, longer, warm)


def test_a_prefix_whose_window_was_evicted_is_computed_again(engine, expected):
    run_one(engine, PROMPTS["130"], greedy(NEW))
    pool = windowed(engine).pool
    pool.release(pool.allocate(pool.num_available))
    again = run_one(engine, PROMPTS["130"], greedy(NEW))
    assert (again.num_cached, again.token_ids) == (0, expected["130"])


def test_forks_and_salts(engine, expected):
    outputs = run_choices(engine, {"90": (PROMPTS["90"], greedy(NEW, n=3))})
    assert [output.token_ids for output in outputs.values()] == [expected["90"]] * 3
    assert [outputs["90", i].num_cached for i in range(3)] == [0, 88, 88]
    engine.add_request("other", PROMPTS["90"], greedy(NEW), cache_salt="tenant")
    other = collect(engine.drain())["other", 0]
    assert (other.num_cached, other.token_ids) == (0, expected["90"])


def test_aborts_return_the_windows_pages(engine, expected):
    for steps in (1, 6, 14):
        for name, (prompt, params) in requests().items():
            engine.add_request(name, prompt, params)
        for _ in range(steps):
            engine.step()
            engine.check_integrity()
        for name in PROMPTS:
            engine.abort(name)
        list(engine.drain())
        check_idle(engine)
    assert_expected(run(engine, requests("21", "90")), expected)


def test_a_long_sequence_holds_its_window_and_no_more(engine):
    group = windowed(engine)
    window = group.window or 0
    engine.add_request("long", PROMPTS["130"], greedy(100))
    decoding = 0
    while engine.has_unfinished:
        engine.step()
        used = group.pool.num_used
        running = engine.scheduler.running.entries
        if running and running[0].request.num_computed > 131:
            decoding += 1
            assert used <= 1 + -(-(window - 1) // 8), "more than the window"
        assert used <= (window + 16 + 5) // 8 + 1, "more than the window and a chunk"
    assert decoding > 90


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("five to one", {"num_gpu_blocks_override": 23, "max_model_len": 176}),
        # Chunks longer than the window, read before the next step is planned.
        (
            "some",
            {
                "num_gpu_blocks_override": 23,
                "max_model_len": 176,
                "async_scheduling": False,
                "max_num_batched_tokens": 40,
            },
        ),
        # There is no full group: for want of pages in the windowed one.
        ("all", {"num_gpu_blocks_override": 6}),
    ],
)
def test_preempted(models, kind, options):
    folder, expected = models(kind)
    engine = small_engine(folder, **options)
    crowd = {f"{name}.{i}": request for i in range(3) for name, request in requests().items()}
    outputs = run(engine, crowd)
    assert engine.stats().num_preemptions > 0
    assert_expected(outputs, {name: expected[name[:-2]] for name in crowd})


def test_scanned_and_on_two_devices(models):
    folder, expected = models("five to one")
    engine = small_engine(folder, max_num_seqs=2, layer_loop="scan", tensor_parallel_size=2)
    for _ in range(2):
        assert_expected(run(engine, requests("21", "130")), expected)


def test_what_stands_in_pages_given_back_reaches_nobody(models):
    """Not even a NaN, which a weight of 0 would not silence."""
    folder, expected = models("some")
    engine = small_engine(folder, enable_prefix_caching=False)
    for name, (prompt, params) in requests().items():
        engine.add_request(name, prompt, params)
    deltas = []
    while engine.has_unfinished:
        deltas += engine.step()
        pools = []
        for pool, plan, group in zip(
            engine.runner.kv, engine.kv_plan.groups, engine.scheduler.groups, strict=True
        ):
            free = [page for page in range(1, plan.pages) if group.pool.refcount(page) == 0]
            ids = np.add.outer(np.arange(len(plan.layers)) * plan.pages, free).ravel().astype(int)
            pools.append(jnp.asarray(np.asarray(pool)).at[ids].set(jnp.nan))
        engine.runner.kv = jax.device_put(
            tuple(pools), jax.tree.map(lambda pool: pool.sharding, engine.runner.kv)
        )
    assert_expected({name: output for (name, _), output in collect(deltas).items()}, expected)


@pytest.mark.parametrize(("loop", "devices"), [("unroll", 1), ("scan", 2)])
def test_every_pool_is_updated_in_place(models, loop, devices):
    engine = small_engine(
        models("five to one")[0],
        kv_cache_memory_bytes=64 * 2**20,
        layer_loop=loop,
        tensor_parallel_size=devices,
    )
    programs, groups = engine.runner.programs, engine.kv_plan.groups
    assert [pool.shape[0] for pool in engine.runner.kv] == [len(g.layers) * g.pages for g in groups]
    smallest = min(group.num_bytes for group in groups) // devices
    for decode_only in (True, False):
        shape = programs.shape_for(decode_only, 4, 16)
        memory = programs.compile(programs.lower(shape)).memory_analysis()
        assert memory.alias_size_in_bytes >= programs.kv_bytes // devices
        # A copy of either pool would be seen.
        assert memory.temp_size_in_bytes < smallest // 4


def test_the_share_of_full_attention_is_told_and_true(models, caplog):
    """A window of 20 tokens reaches over at most 1 + ceil(19 / 8) = 4 of the 64 pages of 512 tokens."""
    caplog.set_level("INFO", "jinfer.engine")
    folder = models("five to one")[0]
    engine = small_engine(folder, max_model_len=512, max_num_seqs=2, enable_prefix_caching=False)
    stats = engine.stats()
    share = (5 * 4 + 1 * 64) / (6 * 64)
    assert stats.kv_fraction == pytest.approx(share)
    assert "5 layers with a window of 20" in caplog.text
    assert f"{share:.3f} of full attention at 512 tokens" in caplog.text
    sliding, full = stats.kv_groups
    assert (sliding.window, sliding.num_layers, full.window, full.num_layers) == (20, 5, None, 1)
    assert sum(group.num_bytes for group in stats.kv_groups) == engine.runner.programs.kv_bytes
    # Two sequences of 512 tokens at once, in that share of the memory: the null pages and one prompt's chunk come on top.
    page, num_layers = full.num_bytes // (2 * 64 + 1), 6
    assert engine.runner.programs.kv_bytes <= (share * 2 * 64 + 1 + 2) * num_layers * page
    prompts = {name: random_prompt(ord(name), 470) for name in "ab"}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(42))
    usage, deltas = [0.0, 0.0], []
    while engine.has_unfinished:
        deltas += engine.step()
        usage = [max(was, group.usage) for was, group in zip(usage, engine.stats().kv_groups, strict=True)]
    assert usage[1] > 0.95
    assert 0.7 < usage[0] <= 1.0
    assert engine.stats().num_preemptions == 0
    for (name, _), output in collect(deltas).items():
        assert_clear_part(folder, prompts[name], output)


def test_a_window_that_reaches_over_every_sequence_is_full_attention(models):
    engine = small_engine(models("some")[0], max_model_len=16)
    (group,) = engine.stats().kv_groups
    assert (group.window, group.num_layers, engine.stats().kv_fraction) == (None, 4, 1.0)
