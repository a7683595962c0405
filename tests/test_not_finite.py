"""Weights that hold NaN or infinity: the requests that meet them end with an error that says so, and no other does."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest

from jinfer import LLM, SamplingParams
from jinfer.errors import RequestFailedError
from tests.support.engines import SMALL, check_idle, collect, greedy, run_one
from tests.support.models import make_model, random_prompt
from tests.support.streams import play, start

GOOD = [(i * 7) % 200 + 20 for i in range(45)]
BEFORE = [(i * 5) % 200 + 20 for i in range(40)]


@pytest.fixture
def engine(warm_llm):
    yield warm_llm.engine
    check_idle(warm_llm.engine)


@contextlib.contextmanager
def broken(engine, token, value=np.nan, weight="embedding"):
    """The engine with that value in the token's row of the embedding, or of the head."""
    whole = engine.runner.params
    (path,) = [path for path in whole if path.split(".")[0] == weight]
    table = whole[path]
    place = (token,) if table.shape[0] == engine.vocab_size else (slice(None), token)
    engine.runner.params = {**whole, path: table.at[place].set(jnp.asarray(value, table.dtype))}
    try:
        yield
    finally:
        engine.runner.params = whole
        engine.scheduler.check_integrity()


KINDS = {
    "greedy": {"temperature": 0.0},
    "random": {"seed": 1},
    "filtered": {"seed": 1, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    "logprobs": {"temperature": 0.0, "logprobs": 3},
    "prompt_logprobs": {"temperature": 0.0, "prompt_logprobs": 1},
    "adjusted": {"repetition_penalty": 1.2, "presence_penalty": 0.3, "logit_bias": {3: 5.0}, "min_tokens": 5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bad", "value"), [(7, np.nan), (0, np.inf)])
def test_a_request_that_meets_them_ends_alone(engine, kind, bad, value):
    """Whatever it asks for, beside one that asks for the same. 0 is the token that fills up short steps."""
    params = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, "seed": 4, **KINDS[kind]})
    prompt = [*BEFORE, bad, *GOOD[:9]]
    engine.scheduler.reset_prefix_cache()
    well = run_one(engine, prompt, params)
    quiet = run_one(engine, GOOD, params)
    engine.scheduler.reset_prefix_cache()
    before = engine.stats()
    with broken(engine, bad, value):
        engine.add_request("good", GOOD, params)
        engine.add_request("bad", prompt, params)
        outputs = collect(engine.drain())
    assert outputs["good", 0].token_ids == quiet.token_ids
    given, wanted = ([entry.logprob for entry in o.logprobs] for o in (outputs["good", 0], quiet))
    assert given == pytest.approx(wanted, abs=1e-4)
    failed = outputs["bad", 0]
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    assert "not finite" in (failed.deltas[-1].error or "")
    after = engine.stats()
    assert after.num_not_finite == before.num_not_finite + 1
    assert after.num_requests_finished["error"] == before.num_requests_finished["error"] + 1
    # Nothing that the faulty request has written is found, and its pages' next owners are well.
    again = run_one(engine, prompt, params)
    assert (again.num_cached, again.token_ids) == (0, well.token_ids)
    assert run_one(engine, GOOD, params).token_ids == quiet.token_ids


def test_a_token_of_the_output_may_be_the_first_to_meet_them(engine):
    with broken(engine, 7):
        # The first token is forced to be the one whose embedding is broken.
        output = run_one(engine, GOOD, greedy(12, logit_bias={7: 100.0}))
    assert (output.finish_reason, output.token_ids) == ("error", [7])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["greedy", "filtered", "adjusted"])
def test_a_broken_head_ends_whoever_wants_a_token(engine, value, kind):
    params = SamplingParams(**{"max_tokens": 12, "n": 2, **KINDS[kind]})
    with broken(engine, 299, value, "head"):
        for i in range(2):
            engine.add_request(str(i), GOOD, params)
        outputs = collect(engine.drain())
    assert {output.finish_reason for output in outputs.values()} == {"error"}


def test_minus_infinity_is_a_logit_like_others(engine):
    """Banned end tokens are minus infinity, and so are all tokens but one of a row that is masked."""
    params = greedy(8, min_tokens=8, stop_token_ids=tuple(range(100, 130)))
    assert run_one(engine, GOOD, params).finish_reason == "length"


def test_pages_of_a_request_that_left_before_its_step_was_read_are_not_found(engine):
    prompt = [7, *BEFORE]
    with broken(engine, 7):
        engine.add_request("bad", prompt, greedy(4))
        for _ in range(2):
            engine.step()
        engine.abort("bad")
        list(engine.drain())
    assert run_one(engine, prompt, greedy(4)).num_cached == 0


def test_scores_vectors_and_texts_of_the_library(warm_llm):
    prompt = [*BEFORE, 7, *GOOD]
    with broken(warm_llm.engine, 7):
        for call in (
            lambda: warm_llm.score([GOOD, prompt]),
            lambda: warm_llm.embed([GOOD, prompt], pooling="last"),
            lambda: warm_llm.embed(prompt, pooling="mean"),
        ):
            with pytest.raises(RequestFailedError, match="not finite"):
                call()
        well, bad = warm_llm.generate([GOOD, prompt], greedy(5))
    assert (well.outputs[0].finish_reason, well.outputs[0].error) == ("length", None)
    assert bad.outputs[0].finish_reason == "error"
    assert "not finite" in bad.outputs[0].error
    check_idle(warm_llm.engine)


def test_a_vector_needs_no_head(warm_llm):
    whole = warm_llm.embed(GOOD)[0].embedding
    with broken(warm_llm.engine, 5, weight="head"):
        np.testing.assert_array_equal(warm_llm.embed(GOOD)[0].embedding, whole)


def test_a_vector_of_the_server(tiny_llama):
    engine = start(tiny_llama)

    async def scenario():
        await engine.wait_ready()
        with broken(engine.engine, 7):
            with pytest.raises(RequestFailedError, match="not finite"):
                await engine.embed([7, *GOOD], request_id="e")
        vector = await engine.embed([7, *GOOD], request_id="e")
        assert np.isfinite(vector).all()

    play(scenario)
    engine.shutdown()


def test_experts_keep_it_to_its_tokens(tmp_path):
    folder = make_model(
        "mixtral",
        tmp_path / "moe",
        seed=2,
        num_hidden_layers=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=12,
    )
    engine = LLM(str(folder), **SMALL).engine
    quiet = run_one(engine, GOOD, greedy(6)).token_ids
    engine.scheduler.reset_prefix_cache()
    with broken(engine, 7):
        engine.add_request("bad", [7, *random_prompt(5, 5, 5)], greedy(6))
        engine.add_request("good", GOOD, greedy(6))
        outputs = collect(engine.drain())
    assert outputs["bad", 0].finish_reason == "error"
    assert outputs["good", 0].token_ids == quiet
