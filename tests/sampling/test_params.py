"""SamplingParams: every value out of range is refused by name; spellings that mean the same are the same."""

import math

import pytest

from jinfer import RequestError, SamplingParams
from jinfer.sampling import features

BAD = {
    "n": [0, -1, 65, 1.0, True, None],
    "temperature": [-0.1, 100.1, math.nan, math.inf, "1", None, True],
    "top_p": [0.0, -0.1, 1.01, math.nan, None],
    "top_k": [-2, 2**31, 1.5, None, False],
    "min_p": [-0.01, 1.01, math.nan],
    "seed": [2**63, -(2**63) - 1, 1.0, "7"],
    "presence_penalty": [-2.01, 2.01, math.nan],
    "frequency_penalty": [-2.01, 2.01, math.inf],
    "repetition_penalty": [0.0, -1.0, 101.0, math.nan, 1e-39, 9e-7],
    "logit_bias": [{-1: 1.0}, {1: 101.0}, {1: -100.5}, {1: math.nan}, {"1": 1.0}, {1.0: 1.0}, [1]],
    "stop": [("",), ("a",) * 17, ("a" * 1025,), (b"a",), 7],
    "stop_token_ids": [(-1,), tuple(range(33)), (1.0,), (True,), 7],
    "min_tokens": [-1, 17, 1.0],
    "max_tokens": [0, -1, 2**31, 1.0],
    "ignore_eos": [1, None],
    "logprobs": [-1, 21, 1.0],
    "prompt_logprobs": [-1, 21, True],
    "skip_special_tokens": ["yes"],
    "include_stop_str_in_output": [None],
}


NUMERIC = ("n", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty")
NUMERIC += ("repetition_penalty", "min_tokens", "max_tokens", "logprobs", "prompt_logprobs")
HUGE = (10**400, -(10**400), 10**5000)  # beyond floats; more digits than Python prints


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name, values in BAD.items() for value in values),
        *((name, value) for name in NUMERIC for value in HUGE),
        *(("logit_bias", {5: value}) for value in HUGE),
        ("logit_bias", {5: 1.0, -(10**5000): 1.0}),
        ("stop_token_ids", (5, -(10**5000))),
        *(
            (name, 10**5000)
            for name in ("stop", "ignore_eos", "skip_special_tokens", "stop_token_ids", "logit_bias")
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert str(caught.value).startswith(name)
    assert "expected" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_caller_may_change_its_bias_table_afterwards():
    bias = {5: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[-7] = 10.0**30
    assert params.logit_bias == {5: 1.0}


def test_too_large_a_bias_table_is_refused():
    SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0))
    with pytest.raises(RequestError, match="logit_bias"):
        SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))


@pytest.mark.parametrize(
    "values",
    [
        {"n": 64},
        {"temperature": 0, "top_p": 1, "min_p": 1},
        {"temperature": 100.0, "top_p": 1e-9, "top_k": -1},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 100.0},
        {"logit_bias": {0: -100, 5: 100.0}},
        {"logit_bias": {}},
        {"max_tokens": None, "min_tokens": 1000},
        {"logprobs": 20, "prompt_logprobs": 0},
    ],
)
def test_the_ends_of_every_range_are_accepted(values):
    SamplingParams(**values)


def test_spellings_that_mean_the_same():
    assert SamplingParams(stop="x").stop == SamplingParams(stop=["x"]).stop == ("x",)  # type: ignore[arg-type]
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()  # type: ignore[arg-type]
    assert SamplingParams(stop_token_ids=[1, 2]).stop_token_ids == (1, 2)  # type: ignore[arg-type]


def test_filters_of_a_greedy_request_cost_nothing():
    greedy = SamplingParams(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1)
    assert features.of(greedy) == 0
    assert not features.needs_tables(greedy)


@pytest.mark.parametrize(
    "values",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
        {"min_tokens": 1},
    ],
)
def test_what_needs_tables_says_so(values):
    assert features.needs_tables(SamplingParams(**values))
