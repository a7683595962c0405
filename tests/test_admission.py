"""Whatever passes the checks of a request can be packed for the device; what cannot is refused by name."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jinfer import RequestError, SamplingParams
from jinfer.admission import choice_seed
from jinfer.errors import RequestFailedError
from jinfer.packing import FIELDS, slot_fields
from jinfer.request import Request
from jinfer.slots import slot_tables
from tests.support.engines import check_idle, collect, greedy, run_choices, run_one
from tests.support.models import random_prompt

VOCAB = 304
PROMPT = random_prompt(3, 9)


@pytest.fixture(scope="module")
def engine(warm_llm):
    return warm_llm.engine


ANY_INT = st.one_of(
    st.integers(),
    st.integers(-3, 70),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**400, -(10**5000)]),
)
ANY = st.one_of(
    ANY_INT,
    st.floats(),
    st.sampled_from([None, True, "5", 5e-324, 1e-39, 1.1754944e-38, 3.4e38, np.float32(0.5), np.int64(3)]),
)
IDS = st.one_of(st.none(), ANY, st.lists(ANY, max_size=4), st.lists(st.integers(0, VOCAB - 1), max_size=40))
FIELD_VALUES = {
    **dict.fromkeys(SamplingParams.__dataclass_fields__, ANY),
    "stop": st.one_of(ANY, st.text(), st.lists(st.one_of(st.text(max_size=3), ANY), max_size=18)),
    "stop_token_ids": IDS,
    "logit_bias": st.one_of(ANY, st.dictionaries(st.one_of(st.integers(0, VOCAB), ANY), ANY, max_size=4)),
}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_parameters_that_pass_can_be_packed(engine, data):
    names = data.draw(st.lists(st.sampled_from(sorted(FIELD_VALUES)), max_size=4, unique=True))
    values = {name: data.draw(FIELD_VALUES[name], label=name) for name in names}
    try:
        params = SamplingParams(**values)
        engine.validate(PROMPT, params)
    except RequestError:
        return
    ends = engine.admission.end_tokens(params)
    seed = engine.admission.seed(params)
    for index in range(params.n):
        request = Request(
            "r", tuple(PROMPT), params, seed=choice_seed(seed, index), banned_token_ids=ends.banned
        )
        row = slot_fields(request)
        assert row.dtype == np.int32
        for name in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency"):
            assert math.isfinite(row[FIELDS.index(name)].view(np.float32)), name
        tables = slot_tables(request, VOCAB)
        assert np.isfinite(tables.bias).all()
        assert (tables.end_ids <= VOCAB).all()


@pytest.mark.parametrize("value", [257, 2**31 - 1])
def test_min_tokens_beyond_the_models_length_is_refused(engine, value):
    params = SamplingParams(min_tokens=value, max_tokens=None)
    for refused in (lambda: engine.validate(PROMPT, params), lambda: engine.add_request("r", PROMPT, params)):
        with pytest.raises(
            RequestError, match=f"min_tokens is {value}, max_model_len is 256: lower it"
        ) as caught:
            refused()
        assert caught.value.param == "min_tokens"
    check_idle(engine)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"priority": "1"}, "priority"),
        ({"priority": 1.0}, "priority"),
        ({"priority": np.arange(2)}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": 10**5000}, "priority"),
        ({"cache_salt": 7}, "cache_salt"),
        ({"cache_salt": None}, "cache_salt"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_what_orders_and_separates_requests_is_checked_too(engine, values, name):
    with pytest.raises(RequestError, match=f"{name} is") as caught:
        engine.add_request("r", PROMPT, greedy(2), **values)
    assert caught.value.param == name
    check_idle(engine)


def test_a_numpy_integer_is_a_priority(engine):
    engine.add_request("r", PROMPT, greedy(2), priority=np.int64(-3), cache_salt="\ud800")
    assert len(collect(engine.drain())["r", 0].token_ids) == 2


@pytest.mark.parametrize("token", [10**5000, -(10**5000), 2**40], ids=["huge", "negative", "large"])
def test_a_huge_token_id_is_refused(engine, token):
    with pytest.raises(RequestError, match="prompt has token id"):
        engine.validate([5, token], greedy(2))
    for values in ({"logit_bias": {abs(token): 1.0}}, {"stop_token_ids": (abs(token),)}):
        with pytest.raises(RequestError, match="has token id"):
            engine.validate(PROMPT, greedy(2, **values))


def test_too_many_end_tokens_are_refused_before_anything_runs(engine, monkeypatch):
    monkeypatch.setattr(engine.admission, "_end_ids", frozenset(range(40)))
    with pytest.raises(RequestError, match="72 end tokens, at most 64 fit"):
        engine.validate(PROMPT, SamplingParams(stop_token_ids=tuple(range(100, 132)), min_tokens=1))


def test_a_fault_in_packing_ends_that_request_alone(engine, monkeypatch, caplog):
    engine.add_request("good", PROMPT, greedy(6))

    def broken(request):
        raise OverflowError("planted")

    monkeypatch.setattr("jinfer.engine.slot_fields", broken)
    with pytest.raises(RequestFailedError, match="'bad' could not be made ready .OverflowError: planted"):
        engine.add_request("bad", PROMPT, greedy(6, n=3))
    monkeypatch.undo()
    assert "bad" in caplog.text
    outputs = collect(engine.drain())
    assert {name for name, _ in outputs} == {"good"}
    check_idle(engine)


# ---- seeds


def test_choices_of_neighbouring_seeds_are_all_different(engine):
    params = {"n": 4, "temperature": 1.0, "max_tokens": 24, "ignore_eos": True}
    requests = {str(seed): (PROMPT, SamplingParams(seed=seed, **params)) for seed in (10, 11)}
    outputs = run_choices(engine, requests)
    assert len({tuple(output.token_ids) for output in outputs.values()}) == 8
    alone = run_one(engine, PROMPT, SamplingParams(seed=11, **{**params, "n": 1}))
    assert outputs["11", 0].token_ids == alone.token_ids


def test_streams_of_seed_and_index_never_meet():
    seeds = [choice_seed(seed, index) for seed in range(-40, 40) for index in range(64)]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert [choice_seed(seed, 0) for seed in (-5, 0, 7)] == [-5, 0, 7]


def test_seed_minus_one_is_random(engine):
    def tokens(seed):
        params = SamplingParams(seed=seed, max_tokens=24, ignore_eos=True)
        return tuple(run_one(engine, PROMPT, params).token_ids)

    assert len({tokens(-1) for _ in range(3)}) == 3
    assert len({tokens(-2) for _ in range(3)}) == 1


def test_a_checked_prompt_is_not_looked_at_again(engine):
    params = SamplingParams()
    checked = engine.validate(PROMPT, params)
    assert list(checked) == list(PROMPT)
    assert engine.validate(checked, params) is checked
    for wrong in ([1, VOCAB], [1, -1], [1, True], [1, 2.0], [1, np.int64(2)], [1, 10**5000]):
        with pytest.raises(RequestError, match="prompt has token id"):
            engine.validate(wrong, params)

    class Id(int):
        pass

    assert engine.validate([Id(1), 2], params) == (1, 2)


def test_a_long_prompt_is_checked_in_c(engine):
    """Beside a loop over it in Python, in the same process."""
    ids = [7, 300, 41] * 300_000
    start = time.thread_time()
    assert all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < VOCAB for i in ids)
    loop = time.thread_time() - start
    start = time.thread_time()
    with pytest.raises(RequestError, match="max_model_len"):
        engine.validate(ids, SamplingParams())
    assert time.thread_time() - start < 0.8 * loop
