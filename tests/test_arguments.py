"""The forms in which `LLM` takes parameters, priorities and messages, and what it refuses by name."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jinfer import ConfigError, EngineConfig, RequestError, SamplingParams, ServerConfig, load_params
from jinfer.arguments import read_chats, read_params, read_priorities
from jinfer.platform import own_settings
from tests.support.engines import check_idle, greedy

DEFAULT = SamplingParams(max_tokens=99)
ONE, TWO = SamplingParams(max_tokens=1), SamplingParams(max_tokens=2, temperature=0.0)

PARAMS: dict[str, Any] = {
    "none": (None, [DEFAULT, DEFAULT]),
    "one": (ONE, [ONE, ONE]),
    "fields": ({"max_tokens": 1}, [ONE, ONE]),
    "a list": ([ONE, TWO], [ONE, TWO]),
    "a tuple of fields": (({"max_tokens": 1}, {"max_tokens": 2, "temperature": 0}), [ONE, TWO]),
    "a generator": ((params for params in (ONE, TWO)), [ONE, TWO]),
    "an array": (np.array([ONE, TWO]), [ONE, TWO]),
}


@pytest.mark.parametrize("case", PARAMS)
def test_parameters_that_are_taken(case):
    given, expected = PARAMS[case]
    assert read_params(given, 2, lambda: DEFAULT) == expected


REFUSED_PARAMS: dict[str, Any] = {
    "a number": (5, "sampling_params is a int, expected SamplingParams, a mapping"),
    "text": ("greedy", "sampling_params is a str"),
    "the class": (SamplingParams, "sampling_params is a type"),
    "nothing among them": ([ONE, None], r"sampling_params\[1\] is None"),
    "text among them": (["a", ONE], r"sampling_params\[0\] is a str"),
    "an unknown field": ({"max_new_tokens": 1}, "no field 'max_new_tokens', expected n, temperature"),
    "a key that is no name": ([ONE, {3: 1}], r"sampling_params\[1\] has no field 3"),
    "a value out of range": ({"top_p": 2}, "top_p is 2"),
    "too few": (iter([ONE]), "1 sampling_params for 2 prompts"),
    "none at all": ([], "0 sampling_params for 2 prompts"),
}


@pytest.mark.parametrize("case", REFUSED_PARAMS)
def test_parameters_that_are_refused(case):
    given, message = REFUSED_PARAMS[case]
    with pytest.raises(RequestError, match=message):
        read_params(given, 2, lambda: DEFAULT)


def test_numpy_values_are_fields_as_pythons_are():
    numpys: dict[str, Any] = {
        "n": np.int64(2),
        "temperature": np.float32(0.5),
        "max_tokens": np.int32(3),
        "seed": np.uint8(7),
        "ignore_eos": np.bool_(True),
        "stop": (text for text in "ab"),
        "stop_token_ids": np.array([1, 2]),
        "logit_bias": {np.int64(5): np.float32(1.0)},
    }
    params = SamplingParams(**numpys)
    plain = SamplingParams(
        n=2,
        temperature=0.5,
        max_tokens=3,
        seed=7,
        ignore_eos=True,
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        logit_bias={5: 1.0},
    )
    assert params == plain
    assert {type(value) for value in (params.n, params.seed, *params.stop_token_ids)} == {int}
    sets: dict[str, Any] = {"stop": {"a"}, "stop_token_ids": {3}}
    assert SamplingParams(**sets) == SamplingParams(stop=("a",), stop_token_ids=(3,))
    wrong: dict[str, Any]
    for wrong in ({"stop": b"a"}, {"stop_token_ids": 3}, {"stop_token_ids": {3: 1}}, {"n": np.float32(2)}):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            SamplingParams(**wrong)


@pytest.mark.parametrize(
    "given", [[2, 1], (2, 1), np.array([2, 1]), (value for value in (2, 1)), [np.int8(2), 1], range(2, 0, -1)]
)
def test_priorities_that_are_taken(given):
    found = read_priorities(given, 2)
    assert found == [2, 1]
    assert {type(value) for value in found} == {int}
    assert read_priorities(None, 2) == [0, 0]


REFUSED_PRIORITIES: dict[str, Any] = {
    "one number": (3, "priority is a int"),
    "text": ("12", "priority is a str"),
    "too few": ([1], "1 priorities for 2 prompts"),
    "fractions": (np.array([1.0, 2.0]), "of prompt 0, priority is 1.0, expected an integer"),
    "truth values": ([1, True], "of prompt 1, priority is True"),
    "nothing": ([1, None], "of prompt 1, priority is None"),
    "beyond 64 bits": ([1, 2**70], "priority"),
}


@pytest.mark.parametrize("case", REFUSED_PRIORITIES)
def test_priorities_that_are_refused(case):
    given, message = REFUSED_PRIORITIES[case]
    with pytest.raises(RequestError, match=message):
        read_priorities(given, 2)


MESSAGE: Any = {"role": "user", "content": "hi"}
DUMPED: Any = SimpleNamespace(model_dump=lambda exclude_none: MESSAGE)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([MESSAGE], [[MESSAGE]]),
        ((m for m in (MESSAGE, MESSAGE)), [[MESSAGE, MESSAGE]]),
        ([DUMPED], [[MESSAGE]]),
        ([[MESSAGE], (DUMPED,)], [[MESSAGE], [MESSAGE]]),
        (([m] for m in (MESSAGE, MESSAGE)), [[MESSAGE], [MESSAGE]]),
        ([], [[]]),
    ],
)
def test_conversations_that_are_taken(given, expected):
    assert read_chats(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [(MESSAGE, "messages is a dict"), ("hi", "messages is a str"), (None, "messages is None")]
    + [([[MESSAGE], MESSAGE], r"messages\[1\] is a dict"), ([[MESSAGE], None], r"messages\[1\] is None")],
)
def test_conversations_that_are_refused(given, message):
    with pytest.raises(RequestError, match=message):
        read_chats(given)


# Through the whole


def test_an_llm_takes_these_forms(warm_llm):
    expected = warm_llm.generate(["ab", "cd"], greedy(3))
    fields = {"max_tokens": np.int64(3), "temperature": 0, "ignore_eos": True}
    for given in (fields, (fields for _ in range(2)), np.array([greedy(3)] * 2)):
        found = warm_llm.generate(iter(["ab", "cd"]), given, priority=np.array([1, 0]))
        assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    (chat,) = warm_llm.chat((message for message in [DUMPED]), fields)
    assert chat.token_ids == warm_llm.chat([MESSAGE], greedy(3))[0].token_ids
    wrong: Any
    for wrong in ([None], [], ["hi"], [[MESSAGE], [None]]):
        with pytest.raises(RequestError):
            warm_llm.chat(wrong, fields)
    check_idle(warm_llm.engine)


def test_paths_are_names_of_models(tiny_llama):
    for config in (EngineConfig(model=tiny_llama, tokenizer=tiny_llama), EngineConfig(model=str(tiny_llama))):
        assert config.model == str(tiny_llama)
    folder: Any = Path("a") / "b"
    assert EngineConfig(compilation_cache_dir=folder).compilation_cache_dir == "a/b"
    assert ServerConfig(chat_template=folder).chat_template == "a/b"
    assert load_params(Path(tiny_llama)).arrays.keys() == load_params(str(tiny_llama)).arrays.keys()
    wrong: dict[str, Any]
    for wrong in ({"model": 3}, {"model": b"a"}, {"seed": Path("a")}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            EngineConfig(**wrong)


# jax's settings


@pytest.mark.parametrize(
    "setting",
    [
        jax.numpy_rank_promotion("raise"),
        jax.transfer_guard("disallow_explicit"),
        jax.debug_nans(True),
    ],
)
def test_an_llm_runs_under_strict_settings(warm_llm, setting):
    expected = warm_llm.generate("ab", greedy(3))[0].token_ids
    with setting:
        assert warm_llm.generate("ab", greedy(3))[0].token_ids == expected
        warm_llm.score(["abc"])
        warm_llm.embed(["abc"])
        with own_settings():  # as an engine starts
            programs = warm_llm.engine.runner.programs
            programs.lower(programs.all_shapes()[0])
    check_idle(warm_llm.engine)


def test_without_jit_an_llm_refuses_by_its_own_words(warm_llm, tiny_llama):
    from jinfer import LLM

    with jax.disable_jit():
        with pytest.raises(ConfigError, match="jax_disable_jit is set"):
            warm_llm.generate("ab", greedy(3))
        with pytest.raises(ConfigError, match="jax_disable_jit is set"):
            LLM(tiny_llama)
    check_idle(warm_llm.engine)
