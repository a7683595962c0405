"""The engine under a mixed random load, with faults, swapped weights and refusals: nothing leaks, nothing compiles."""

import random
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer import QueueFullError, RequestError, SamplingParams, load_params
from jinfer.text import IncrementalDetokenizer
from tests.support.engines import check_idle, collect, greedy, run, run_choices, run_one, small_engine
from tests.support.models import GROUPED, hf_greedy, make_llama, random_prompt

PROMPT = random_prompt(520, 21)


@pytest.fixture(scope="module")
def engine(warm_llm):
    return warm_llm.engine


def random_params(dice: random.Random) -> SamplingParams:
    """Anything that a request may ask for."""
    values: dict[str, Any] = {"max_tokens": dice.randint(1, 40), "temperature": dice.choice([0.0, 0.7, 1.5])}
    choices: dict[str, list[Any]] = {
        "n": [2, 5],
        "top_k": [3, 40],
        "top_p": [0.5, 0.95],
        "min_p": [0.1],
        "seed": [1, -5],
        "presence_penalty": [0.5],
        "repetition_penalty": [1.3],
        "logit_bias": [{5: 3.0}],
        "stop_token_ids": [(7, 8, 9)],
        "stop": [("a", "bc")],
        "ignore_eos": [True],
        "logprobs": [0, 5],
        "prompt_logprobs": [2],
    }
    for name in dice.sample(sorted(choices), 4):
        values[name] = dice.choice(choices[name])
    if dice.random() < 0.2:
        values["min_tokens"] = values["max_tokens"] // 2
    return SamplingParams(**values)


class CompileCounter:
    """Everything that XLA compiles while it is open."""

    def __enter__(self) -> "CompileCounter":
        self.names: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.names.append(str(kwargs.get("fun_name", event)))


def test_a_mixed_random_load_with_aborts_compiles_nothing_and_leaves_nothing(engine):
    dice = random.Random(7)
    shared = random_prompt(1, 60)
    before = engine.stats()
    waiting = list(range(120))
    asked, aborted, deltas = {}, set(), []
    with CompileCounter() as compiled:
        while waiting or engine.has_unfinished:
            while waiting and dice.random() < 0.5:
                name = f"load-{waiting.pop()}"
                own = random_prompt(dice.randrange(10**6), dice.randint(1, 90))
                prompt = shared[: dice.randint(1, 60)] + own if dice.random() < 0.5 else own
                asked[name] = prompt, random_params(dice)
                engine.add_request(name, *asked[name])
            deltas += engine.step()
            if asked and dice.random() < 0.1:
                name = dice.choice(sorted(asked))
                aborted.add(name)
                engine.abort(name)
            if dice.random() < 0.05:
                engine.check_integrity()
    assert compiled.names == []
    check_idle(engine)
    outputs = collect(deltas)
    assert {name for name, _ in outputs} == set(asked)
    for (name, _), output in outputs.items():
        prompt, params = asked[name]
        assert output.finish_reason in ("stop", "length", "abort")
        assert output.finish_reason != "abort" or name in aborted
        assert output.finish_reason != "length" or len(output.token_ids) == params.max_tokens
        assert len(output.logprobs) == (0 if params.logprobs is None else len(output.token_ids))
        if not params.min_tokens:  # before min_tokens a stop string is plain text
            assert not any(stop in output.text for stop in params.stop)
        if output.token_ids and params.prompt_logprobs is not None:
            has_told = output.prompt_logprobs is not None
            assert has_told == (output.deltas[0].index == 0)
    after = engine.stats()
    ended = sum(after.num_requests_finished.values()) - sum(before.num_requests_finished.values())
    assert ended == len(outputs) == sum(params.n for _, params in asked.values())
    generated = after.generation_tokens - before.generation_tokens
    assert generated == sum(len(output.token_ids) for output in outputs.values())
    processed = after.prompt_tokens - before.prompt_tokens
    ended_well = {name for (name, _), output in outputs.items() if output.finish_reason != "abort"}
    assert processed >= sum(len(asked[name][0]) for name in ended_well)
    assert processed <= sum(len(prompt) for prompt, _ in asked.values())
    assert after.prefix_cache_hits > before.prefix_cache_hits


def test_the_compile_counter_can_count():
    with CompileCounter() as compiled:
        jax.jit(lambda x: x * 3 + 17).lower(jnp.zeros(3)).compile()
    assert len(compiled.names) >= 1


def test_compiling_while_serving_is_counted_and_logged(tiny_llama, caplog):
    engine = small_engine(tiny_llama, max_num_seqs=1, max_model_len=64, warmup=True)
    engine.runner._compiled.clear()
    engine.add_request("one", PROMPT, greedy(2))
    list(engine.drain())
    assert engine.stats().recompiles == 2
    assert "compiling step" in caplog.text


# ---- new weights


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("other") / "llama", seed=5, **GROUPED)


def test_new_weights_act_on_what_runs_and_on_what_comes(engine, other_folder):
    """A running request goes on with the new weights, new ones find no page of the old ones, and back again."""
    old, new = load_params(str(engine.folder)), load_params(str(other_folder))
    before = run_one(engine, PROMPT, greedy(30)).token_ids
    assert before == hf_greedy(engine.folder, PROMPT, 30)[0]
    engine.add_request("running", PROMPT, greedy(60))
    deltas = []
    while sum(len(d.token_ids) for d in deltas) < 25:
        deltas += engine.step()
    with CompileCounter() as compiled:
        engine.update_weights(new)
        deltas += engine.drain()
    running = collect(deltas)["running", 0].token_ids
    assert running[:25] == before[:25]
    assert running[30:] != hf_greedy(engine.folder, PROMPT, 60)[0][30:]
    after = run_one(engine, PROMPT, greedy(30))
    assert after.num_cached == 0
    assert after.token_ids == hf_greedy(other_folder, PROMPT, 30)[0]
    engine.update_weights(old)
    assert run_one(engine, PROMPT, greedy(30)).token_ids == before
    assert not any("step" in name for name in compiled.names)
    check_idle(engine)


def test_the_caller_may_give_its_arrays_away_after_the_swap(engine):
    """A training step that donates its parameters must not take the engine's with them."""
    params = load_params(str(engine.folder))
    engine.update_weights(params)
    give_away = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    jax.block_until_ready(give_away(params.arrays))
    assert run_one(engine, PROMPT, greedy(10)).token_ids == hf_greedy(engine.folder, PROMPT, 10)[0]


def test_sharded_weights_are_swapped_in_place(tiny_llama, other_folder):
    engine = small_engine(tiny_llama, max_num_seqs=2, tensor_parallel_size=4)
    shardings = {path: x.sharding for path, x in engine.runner.params.items()}
    engine.update_weights(load_params(str(other_folder), tensor_parallel_size=4))
    assert {path: x.sharding for path, x in engine.runner.params.items()} == shardings
    assert run_one(engine, PROMPT, greedy(20)).token_ids == hf_greedy(other_folder, PROMPT, 20)[0]


# ---- faults


def test_a_step_that_fails_poisons_no_page(engine, monkeypatch):
    """The lost step was to fill findable pages with the prompt; nobody may find them afterwards."""
    prompt = random_prompt(31, 100)
    real = engine.runner.dispatch

    def fail(batch):
        if batch.rows[0].start >= 64:
            raise OSError("the device is gone")
        return real(batch)

    engine.add_request("one", prompt, greedy(8))
    monkeypatch.setattr(engine.runner, "dispatch", fail)
    with pytest.raises(OSError, match="the device is gone"):
        for _ in range(10):
            engine.step()
    monkeypatch.undo()
    errors = engine.stats().num_requests_finished["error"]
    (delta,) = engine.fail_all("out of order")
    assert (delta.request_id, delta.finish_reason and delta.finish_reason.value) == ("one", "error")
    assert delta.error == "out of order"
    assert engine.stats().num_requests_finished["error"] == errors + 1
    check_idle(engine)
    again = run_one(engine, prompt, greedy(8))
    assert again.num_cached == 0
    assert again.token_ids == hf_greedy(engine.folder, prompt, 8)[0]


def test_a_fault_in_one_requests_text_ends_that_request_alone(engine, monkeypatch, caplog):
    for name in ("good", "bad"):
        engine.add_request(name, PROMPT, greedy(12))
    stream = next(s for r, s in engine._streams.items() if r.request_id == "bad")
    pushed = iter(range(100))

    class Faulty:
        stopped_by = None

        def push(self, token: int, may_stop: bool) -> str:
            if next(pushed) == 3:
                raise KeyError(token)
            return ""

        def flush(self, may_stop: bool) -> str:
            return ""

    monkeypatch.setattr(stream, "detokenizer", Faulty())
    outputs = collect(engine.drain())
    check_idle(engine)
    assert outputs["good", 0].token_ids == hf_greedy(engine.folder, PROMPT, 12)[0]
    bad = outputs["bad", 0]
    assert bad.finish_reason == "error"
    assert len(bad.token_ids) == 4
    assert "KeyError" in (bad.deltas[-1].error or "")
    assert "bad" in caplog.text


# ---- refusals


@pytest.mark.parametrize(
    ("prompt", "values", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1, 304], {}, "token id 304, expected integers from 0 to 303"),
        ([-1], {}, "token id -1"),
        ([True], {}, "token id True"),
        ([1.0], {}, "token id 1.0"),
        ([5] * 256, {}, "256 tokens, max_model_len is 256"),
        ([5], {"logit_bias": {304: 1.0}}, "logit_bias has token id 304"),
        ([5], {"stop_token_ids": (400,)}, "stop_token_ids has token id 400"),
    ],
)
def test_what_cannot_run_is_refused(engine, prompt, values, message):
    with pytest.raises(RequestError, match=message):
        engine.add_request("bad", prompt, SamplingParams(**values))
    check_idle(engine)


def test_choices_of_a_prompt_read_it_once(engine, monkeypatch):
    opened = []

    class Counted(IncrementalDetokenizer):
        def __init__(self, *arguments, **options):
            opened.append(arguments)
            super().__init__(*arguments, **options)

    monkeypatch.setattr("jinfer.outputs.IncrementalDetokenizer", Counted)
    outputs = run_choices(engine, {"r": (random_prompt(3, 30), greedy(6, n=3))})
    assert len({output.text for output in outputs.values()}) == 1
    assert len(opened) == 1


def test_an_id_in_use_is_refused_and_its_owner_unharmed(engine):
    engine.add_request("same", PROMPT, greedy(20))
    engine.step()
    with pytest.raises(RequestError, match="'same' is in use"):
        engine.add_request("same", [1, 2, 3], greedy(2))
    assert collect(engine.drain())["same", 0].token_ids == hf_greedy(engine.folder, PROMPT, 20)[0]
    assert len(run_one(engine, PROMPT, greedy(3)).token_ids) == 3


def test_a_group_that_the_queue_cannot_hold_leaves_nothing(tiny_llama):
    engine = small_engine(tiny_llama, max_num_waiting=3)
    engine.add_request("fits", PROMPT, greedy(3))
    with pytest.raises(QueueFullError) as caught:
        engine.add_request("too many", PROMPT, greedy(3, n=3))
    assert caught.value.retry_after >= 1
    assert engine.stats().num_waiting == 1
    assert set(collect(engine.drain())) == {("fits", 0)}
    check_idle(engine)


def test_aborts(engine):
    """Of a running request, of a waiting one, of a group, of none; with a last delta or silently."""
    for i in range(12):
        engine.add_request(f"r{i}", PROMPT, greedy(50, n=2 if i == 3 else 1))
    for _ in range(6):
        engine.step()
    assert engine.stats().num_waiting > 0
    for name in ("r0", "r3", "r11", "nobody"):
        engine.abort(name)
    engine.abort("r1", silent=True)
    engine.check_integrity()
    outputs = collect(engine.drain())
    check_idle(engine)
    assert {key for key, output in outputs.items() if output.finish_reason == "abort"} == {
        ("r0", 0),
        ("r3", 0),
        ("r3", 1),
        ("r11", 0),
    }
    assert ("r1", 0) not in outputs
    assert outputs["r2", 0].finish_reason == "length"


# ---- preemption, cache and books


def test_preemption_shows_in_nothing_but_the_counters(tiny_llama):
    """Log-probabilities of prompt and output are told once and whole, and times stay in order."""
    prompts = {str(i): random_prompt(40 + i, 30) for i in range(4)}
    params = SamplingParams(
        max_tokens=60, ignore_eos=True, seed=3, repetition_penalty=1.1, logprobs=2, prompt_logprobs=1
    )
    tight = small_engine(tiny_llama, num_gpu_blocks_override=33)
    roomy = small_engine(tiny_llama)
    requests = {name: (prompt, params) for name, prompt in prompts.items()}
    pushed, expected = run(tight, requests), run(roomy, requests)
    assert tight.stats().num_preemptions > 0
    assert roomy.stats().num_preemptions == 0
    for name, output in pushed.items():
        assert output.token_ids == expected[name].token_ids
        assert len(output.logprobs) == 60
        assert sum(delta.prompt_logprobs is not None for delta in output.deltas) == 1
        told, wanted = output.prompt_logprobs, expected[name].prompt_logprobs
        assert told is not None
        assert wanted is not None
        assert [entry and entry.token_id for entry in told] == [None, *prompts[name][1:]]
        np.testing.assert_allclose(
            [entry.logprob for entry in told[1:]], [entry.logprob for entry in wanted[1:]], atol=1e-4
        )
        times = output.deltas[-1].timings
        assert times is not None
        order = [times.arrival, times.scheduled, times.first_token, times.finished, time.monotonic()]
        assert order == sorted(t for t in order if t is not None)


def test_prompt_logprobs_need_no_cache_and_leave_it_whole(engine):
    prompt = random_prompt(77, 50)
    cold = run_one(engine, prompt, greedy(2, prompt_logprobs=1))
    warm = run_one(engine, prompt, greedy(2))
    again = run_one(engine, prompt, greedy(2, prompt_logprobs=1, n=3))
    assert (cold.num_cached, warm.num_cached, again.num_cached) == (0, 48, 0)
    assert cold.prompt_logprobs is not None
    assert again.prompt_logprobs is not None
    np.testing.assert_allclose(
        [entry.logprob for entry in again.prompt_logprobs[1:]],
        [entry.logprob for entry in cold.prompt_logprobs[1:]],
        atol=1e-4,
    )


def test_cache_salts_part_their_users(engine):
    prompt = random_prompt(78, 40)
    cached = []
    for salt in ("mine", "mine", "yours", ""):
        engine.add_request("one", prompt, greedy(2), cache_salt=salt)
        cached.append(collect(engine.drain())["one", 0].num_cached)
    assert cached == [0, 32, 0, 0]


def test_without_prefix_caching_nothing_is_found(tiny_llama):
    engine = small_engine(tiny_llama, enable_prefix_caching=False)
    outputs = [run_one(engine, PROMPT, greedy(5)) for _ in range(2)]
    assert [output.num_cached for output in outputs] == [0, 0]
    assert engine.stats().prefix_cache_queries == 0


def test_forks_end_each_at_its_own_time(engine):
    params = SamplingParams(n=6, seed=1, max_tokens=40, stop_token_ids=tuple(range(20, 52)))
    outputs = run_choices(engine, {"one": (PROMPT, params)})
    lengths = {len(output.token_ids) for output in outputs.values()}
    assert len(lengths) > 2
    for output in outputs.values():
        if output.finish_reason == "stop":
            assert output.stop_reason == output.token_ids[-1]
            assert output.stop_reason in params.stop_token_ids
