"""When and how a request of `LLM` ends: stop strings and tokens, lengths, and what its timings say."""

from typing import Any

import pytest

from jinfer import LLM, SamplingParams
from tests.support.engines import SMALL, check_idle, greedy, run_one
from tests.support.models import make_llama, random_prompt

END = 256  # the byte tokenizer's end token
PROMPT = random_prompt(1, 20)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(str(make_llama(tmp_path_factory.mktemp("llm") / "model", seed=1, scale=0.2)), **SMALL)


@pytest.fixture(autouse=True)
def idle_afterwards(llm):
    yield
    check_idle(llm.engine)


@pytest.fixture(scope="module")
def expected(llm):
    """Eight greedy tokens after PROMPT."""
    return llm.generate(PROMPT, greedy(8))[0].token_ids


@pytest.fixture(scope="module")
def letters(llm):
    """Parameters under which the model writes letters, none so often that a stop string comes at once."""
    ids = llm.tokenizer.encode(LETTERS)
    assert len(ids) == len(LETTERS)
    bias = dict.fromkeys(ids, 100.0)
    return {"logit_bias": bias, "temperature": 5.0, "seed": 4, "max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def written(llm, letters):
    """What those parameters give, a character a token."""
    output = llm.generate("go:", SamplingParams(**letters))[0]
    assert len(output.text) == 40
    assert set(output.text) <= set(LETTERS)
    assert len(set(output.text)) > 8
    return output.text


def timings(output) -> Any:
    return output.outputs[0].timings


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_and_never_leaks(llm, letters, written, include):
    stop = written[17:20]
    at = written.index(stop)
    params = SamplingParams(**letters, stop=("0never", stop), include_stop_str_in_output=include)
    (output,) = llm.generate("go:", params)
    assert output.text == written[: at + 3 if include else at]
    assert len(output.token_ids) == at + 3  # tokens tell what was computed
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    # As a stream: nothing is shown that would have to be taken back.
    streamed = run_one(llm.engine, llm.encode("go:"), params)
    assert streamed.text == output.text
    assert streamed.stop_reason == stop


def test_held_back_text_is_told_in_the_end(llm, letters, written):
    """The output ends within what could have become a stop string."""
    params = SamplingParams(**{**letters, "max_tokens": 20}, stop=(written[17:20] + "0",))
    (output,) = llm.generate("go:", params)
    assert output.text == written[:20]
    assert output.outputs[0].finish_reason == "length"


def test_a_stop_string_in_the_last_allowed_token_is_a_stop(llm, letters, written):
    at = written.index(written[17:20])
    params = SamplingParams(**{**letters, "max_tokens": at + 3}, stop=written[17:20])
    (output,) = llm.generate("go:", params)
    assert output.text == written[:at]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", written[17:20])


def test_stop_strings_wait_for_min_tokens(llm, letters, written):
    stop = written[0]
    (now,) = llm.generate("go:", SamplingParams(**letters, stop=stop))
    assert now.text == ""
    assert len(now.token_ids) == 1
    later = SamplingParams(**letters, stop=stop, min_tokens=3)
    (output,) = llm.generate("go:", later)
    at = written.find(stop, 3)
    assert output.text == (written if at < 0 else written[:at])
    assert len(output.token_ids) > 3


def test_a_stop_token_ends_it_and_has_no_text(llm, expected):
    token = next(t for i, t in enumerate(expected) if i > 1 and t not in expected[:i])
    end = expected.index(token) + 1
    (output,) = llm.generate(PROMPT, greedy(8, stop_token_ids=(token,)))
    assert output.token_ids == expected[:end]
    assert output.text == llm.tokenizer.decode(expected[: end - 1])
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", token)
    # Before min_tokens it cannot even be drawn.
    (later,) = llm.generate(PROMPT, greedy(8, stop_token_ids=(token,), min_tokens=7))
    assert token not in later.token_ids[:7]
    assert len(later.token_ids) >= 7


def test_the_models_end_token_ends_it_unless_ignored(llm):
    wish = {"logit_bias": {END: 100.0}, "max_tokens": 6, "temperature": 0.0}
    ended, banned, ignored = llm.generate(
        [PROMPT] * 3,
        [
            SamplingParams(**wish),
            SamplingParams(**wish, min_tokens=4),
            SamplingParams(**wish, ignore_eos=True, skip_special_tokens=False),
        ],
    )
    assert ended.token_ids == [END]
    assert ended.text == ""
    assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", None)
    assert len(banned.token_ids) == 5
    assert banned.token_ids.index(END) == 4
    assert ignored.token_ids == [END] * 6
    assert ignored.text == "<|end|>" * 6
    assert ignored.outputs[0].finish_reason == "length"


def test_without_max_tokens_it_goes_on_to_the_models_length(llm):
    for length in (250, 255):
        (output,) = llm.generate(
            random_prompt(40, length), SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
        )
        assert length + len(output.token_ids) == llm.engine.max_model_len == 256
        assert output.outputs[0].finish_reason == "length"


def test_timings_are_in_order(llm):
    outputs = llm.generate([random_prompt(60 + i, 30) for i in range(6)], greedy(6))
    for output in outputs:
        t = timings(output)
        assert t.arrival < t.scheduled < t.first_token < t.finished
    # Four run at once: the fifth starts when another has ended.
    ends = sorted(timings(o).finished for o in outputs)
    assert timings(outputs[4]).scheduled > ends[0]
