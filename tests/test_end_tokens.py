"""What ends an output: the model's own tokens, a request's, and stop strings that only a special token can give."""

import json

import pytest

from jinfer import SamplingParams
from jinfer.errors import ModelError
from jinfer.token_ids import read_token_ids
from tests.support.engines import check_idle, greedy, run_one, small_engine
from tests.support.models import END, GROUPED, make_llama, random_prompt

PROMPT = random_prompt(31, 12)
END_ID = 256  # the tests' models have one special token, their end
WANTS_END = {"logit_bias": {END_ID: 100.0}}


@pytest.fixture
def engine(warm_llm):
    yield warm_llm.engine
    check_idle(warm_llm.engine)


@pytest.mark.parametrize("values", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "random"])
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_no_end_token_comes_before_min_tokens(engine, values, ignore_eos):
    params = greedy(8, min_tokens=5, **{**WANTS_END, **values, "ignore_eos": ignore_eos})
    tokens = run_one(engine, PROMPT, params).token_ids
    assert END_ID not in tokens[:5]
    assert tokens[5:] == [END_ID] * (3 if ignore_eos else 1)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_that_is_a_special_token_stops(engine, include):
    params = greedy(8, stop=("x" * 9, END), min_tokens=3, include_stop_str_in_output=include, **WANTS_END)
    output = run_one(engine, PROMPT, params)
    assert (output.finish_reason, output.stop_reason) == ("stop", END)
    assert END_ID not in output.token_ids[:3]
    assert output.token_ids[3:] == [END_ID]
    assert output.text == engine.tokenizer.decode(output.token_ids[:3]) + (END if include else "")


def test_it_comes_behind_text_that_was_held_back(engine):
    """The output may be the beginning of another stop string when the special token ends it."""
    plain = run_one(engine, PROMPT, greedy(4))
    params = greedy(
        8, stop=(plain.text + "!", END), min_tokens=4, include_stop_str_in_output=True, **WANTS_END
    )
    output = run_one(engine, PROMPT, params)
    assert output.text == plain.text + END
    assert (output.finish_reason, output.stop_reason) == ("stop", END)


def test_where_special_tokens_show_it_is_a_string_like_others(engine):
    params = greedy(8, stop=(END,), skip_special_tokens=False, **WANTS_END)
    output = run_one(engine, PROMPT, params)
    assert (output.text, output.finish_reason, output.stop_reason) == ("", "stop", END)


def test_a_stop_token_id_is_named_before_the_string(engine):
    output = run_one(engine, PROMPT, greedy(8, stop=(END,), stop_token_ids=(END_ID,), **WANTS_END))
    assert (output.finish_reason, output.stop_reason, output.text) == ("stop", END_ID, "")


def test_end_ids_beyond_the_vocabulary_are_left_out(tmp_path, caplog):
    folder = make_llama(tmp_path / "model", **{**GROUPED, "seed": 24})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END_ID, 2**40, -1]}))
    engine = small_engine(folder)
    assert engine.end_ids == {END_ID}
    assert "1099511627776, -1, outside of the vocabulary of 304 tokens: left out" in caplog.text
    params = SamplingParams(max_tokens=4, presence_penalty=1.0, min_tokens=2, seed=1)
    assert len(run_one(engine, PROMPT, params).token_ids) >= 2


@pytest.mark.parametrize(
    ("stated", "ids"),
    [(None, ()), (3, (3,)), ([3, 2, 3], (3, 2)), (2**31, ()), ([5, -1, 10**5000, 9], (5,)), ([], ())],
    ids=lambda value: "",
)
def test_one_reader_reads_token_ids(stated, ids):
    assert read_token_ids(stated, 9, "a file") == ids


@pytest.mark.parametrize("stated", ["2", [2, None], [True], 2.0, {"a": 1}, [[1]]])
def test_what_is_no_id_is_refused(stated):
    with pytest.raises(ModelError, match="a file: eos_token_id is .*expected an integer or a list of them"):
        read_token_ids(stated, 9, "a file")


EXTREMES = [
    {"temperature": temperature, "repetition_penalty": repetition, "top_p": top_p, "min_p": min_p}
    for temperature, top_p, min_p in ((5e-324, 1.0, 0.0), (1e-39, 1e-45, 1e-45), (100.0, 5e-324, 1.0))
    for repetition in (1e-6, 100.0)
]


@pytest.mark.parametrize("values", EXTREMES, ids=lambda v: f"{v['temperature']}-{v['repetition_penalty']}")
def test_the_ends_of_all_ranges_stay_within_float32(engine, values):
    """Every number at its end at once: the coldest, the most penalized, the most biased; nothing overflows."""
    bias = {i: 100.0 if i % 2 else -100.0 for i in range(150)}
    params = SamplingParams(
        **values,
        seed=1,
        max_tokens=6,
        ignore_eos=True,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=bias,
    )
    before = engine.stats().num_not_finite
    output = run_one(engine, PROMPT, params)
    assert (output.finish_reason, len(output.token_ids)) == ("length", 6)
    assert engine.stats().num_not_finite == before
    if values["temperature"] < 1:
        # So cold that only the most likely token is left.
        assert (
            output.token_ids
            == run_one(engine, PROMPT, SamplingParams(**{**vars(params), "temperature": 0.0})).token_ids
        )
