"""Sampling through the whole engine: against logits of transformers, for tokens that follow other tokens."""

import numpy as np
import pytest

from jinfer import SamplingParams
from tests.support.distribution import adjusted_logits, chi_square_z, exact_probabilities
from tests.support.engines import run, run_choices, run_one, small_engine
from tests.support.models import hf_logits, random_prompt

PROMPT = [9, 9, 40, 41, 42, 9]
ENDS = (11, 12)

FIRST_TOKEN = {
    "plain": {"temperature": 0.8},
    "top_k": {"top_k": 9},
    "top_p": {"temperature": 1.5, "top_p": 0.6},
    "min_p": {"temperature": 0.6, "min_p": 0.1},
    "repetition": {"temperature": 0.5, "repetition_penalty": 2.5},
    "logit_bias": {"temperature": 0.5, "logit_bias": {3: 3.0, 9: 2.0}},
    "min_tokens": {"temperature": 0.5, "logit_bias": {11: 6.0, 100: 5.0}, "min_tokens": 1},
}


@pytest.fixture(scope="module")
def engine(warm_llm):
    return warm_llm.engine


@pytest.mark.parametrize("name", FIRST_TOKEN)
def test_first_tokens_of_many_seeds_follow_the_exact_distribution(engine, name):
    kind = {"max_tokens": 1, "stop_token_ids": ENDS, "n": 64, **FIRST_TOKEN[name]}
    requests = {str(i): (PROMPT, SamplingParams(seed=10_000 * i, **kind)) for i in range(16)}
    outputs = run_choices(engine, requests)
    counts = np.bincount([o.token_ids[0] for o in outputs.values()], minlength=engine.vocab_size)
    assert counts.sum() == 1024
    params = SamplingParams(**kind)
    expected = exact_probabilities(hf_logits(engine.folder, PROMPT)[-1], params, PROMPT, (), ENDS)
    assert -4 < chi_square_z(counts, expected) < 4


def test_requests_without_a_seed_follow_the_distribution_too(engine):
    params = SamplingParams(max_tokens=1, temperature=0.8)
    outputs = run(engine, {str(i): (PROMPT, params) for i in range(768)})
    counts = np.bincount([o.token_ids[0] for o in outputs.values()], minlength=engine.vocab_size)
    expected = exact_probabilities(hf_logits(engine.folder, PROMPT)[-1], params)
    assert -4 < chi_square_z(counts, expected) < 4


@pytest.mark.parametrize(
    "kind",
    [
        {"presence_penalty": 1.7},
        {"frequency_penalty": 0.8},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7, "presence_penalty": -0.5},
        {"logit_bias": {5: 3.0, 6: 3.0, 7: -100.0}, "frequency_penalty": 1.0},
        {"min_tokens": 30, "logit_bias": {11: 8.0}},
    ],
)
@pytest.mark.parametrize("prompt", [PROMPT, random_prompt(8, 50)], ids=["short", "long"])
def test_penalties_count_what_was_really_generated(engine, kind, prompt):
    """Greedy tokens with penalties, each checked against the penalized logits of transformers at its place."""
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop_token_ids=ENDS, **kind)
    tokens = run_one(engine, prompt, params).token_ids
    assert len(tokens) >= params.min_tokens
    logits = hf_logits(engine.folder, [*prompt, *tokens])
    for i, token in enumerate(tokens):
        row = adjusted_logits(logits[len(prompt) + i - 1], params, prompt, tokens[:i], ENDS)
        assert row[token] >= row.max() - 1e-4 * np.abs(row[np.isfinite(row)]).max()


@pytest.mark.parametrize(
    "kind", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.4}, {"top_k": 6, "top_p": 0.7, "min_p": 0.2}]
)
def test_no_dropped_token_is_ever_drawn(engine, kind):
    params = SamplingParams(temperature=1.2, max_tokens=60, ignore_eos=True, seed=5, n=4, **kind)
    outputs = run_choices(engine, {"one": (PROMPT, params)})
    drawn = 0
    for output in outputs.values():
        logits = hf_logits(engine.folder, [*PROMPT, *output.token_ids]).astype(np.float64)
        for i, token in enumerate(output.token_ids):
            row = logits[len(PROMPT) + i - 1]
            if exact_probabilities(row, params)[token] == 0:
                # Only if it is at the threshold within float32's deviation.
                assert exact_probabilities(row + 1e-4 * np.eye(len(row))[token], params)[token] > 0
            drawn += token != int(np.argmax(row))
    assert drawn > 10, "some draws should differ from the greedy token"


def test_seeds(engine):
    """The same seed repeats, another differs, forks differ from each other, and a fork is a seed of its own."""

    def sampled(seed: int | None, n: int = 1) -> SamplingParams:
        return SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True, seed=seed, n=n)

    first, again, other = (run_one(engine, PROMPT, sampled(seed)).token_ids for seed in (1, 1, 2))
    assert first == again
    assert first != other
    forks = run_choices(engine, {"one": (PROMPT, sampled(1, n=5))})
    texts = [tuple(forks["one", i].token_ids) for i in range(5)]
    assert len(set(texts)) == 5
    assert list(texts[0]) == first
    unseeded = {tuple(run_one(engine, PROMPT, sampled(None)).token_ids) for _ in range(4)}
    assert len(unseeded) == 4


def test_engines_with_the_same_seed_repeat_and_with_another_do_not(tiny_llama):
    def draws(seed: int) -> list[list[int]]:
        engine = small_engine(tiny_llama, seed=seed)
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        return [run_one(engine, PROMPT, params).token_ids for _ in range(6)]

    zero = draws(0)
    assert zero == draws(0)
    for other in (1, 2, 3):
        assert not {tuple(t) for t in zero} & {tuple(t) for t in draws(other)}, "streams overlap"


@pytest.mark.parametrize("caching", [True, False])
def test_forks_share_the_pages_of_their_prompt(tiny_llama, caching):
    """Five full pages of prompt once, and per fork one page of its own and what it generates."""
    engine = small_engine(tiny_llama, enable_prefix_caching=caching)
    prompt = random_prompt(3, 43)
    engine.add_request("one", prompt, SamplingParams(n=4, max_tokens=12, ignore_eos=True, seed=3))
    most, cached = 0, {}
    while engine.has_unfinished:
        for delta in engine.step():
            cached[delta.index] = delta.num_cached_tokens
        if engine.stats().num_running == 4:
            most = max(most, engine.scheduler.groups[0].pool.num_used)
            engine.check_integrity()
    assert cached == {0: 0, 1: 40, 2: 40, 3: 40}
    assert 5 + 4 <= most <= 5 + 4 * 2
    engine.check_integrity()
    # Another request finds nothing unless it may.
    engine.add_request("two", prompt, SamplingParams(max_tokens=1))
    assert {delta.num_cached_tokens for delta in engine.drain()} == {40 if caching else 0}
