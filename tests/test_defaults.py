"""generation_config.json: what it says holds for requests that leave it open, and for nothing else."""

import json
from typing import Any

import pytest

from jinfer import LLM, AsyncEngine, EngineConfig, SamplingParams
from jinfer.defaults import generation_defaults, generation_end_ids
from jinfer.errors import ConfigError, ModelError
from tests.support.engines import SMALL, check_idle, greedy
from tests.support.models import make_llama, random_prompt
from tests.support.streams import play

PROMPT = random_prompt(1, 12)


def write(folder, values):
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


STATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "all": (
        {
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "max_new_tokens": 7,
            "eos_token_id": [3, 4],
            "max_length": 20,
        },
        {
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "max_tokens": 7,
        },
    ),
    "nulls": ({"temperature": None, "top_k": None, "do_sample": None}, {}),
    "greedy": (
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.2},
        {"temperature": 0.0, "repetition_penalty": 1.2},
    ),
}


@pytest.mark.parametrize("case", STATED)
def test_what_is_stated_becomes_a_default(tmp_path, case):
    given, expected = STATED[case]
    folder = write(tmp_path / "model", given)
    assert generation_defaults("auto", folder) == expected
    assert generation_defaults("vllm", folder) == {}
    assert generation_defaults(str(folder), tmp_path) == expected
    assert generation_end_ids("auto", folder, 304) == frozenset()  # the model's own are read with its config
    assert generation_end_ids(str(folder), tmp_path, 304) == frozenset(given.get("eos_token_id", []))


def test_a_model_without_the_file_states_nothing(tmp_path):
    assert generation_defaults("auto", tmp_path) == {}


def test_files_at_fault_are_named(tmp_path):
    with pytest.raises(
        ConfigError, match="generation_config is .*nowhere.*expected 'auto', 'vllm' or a folder"
    ):
        generation_defaults(str(tmp_path / "nowhere"), tmp_path)
    for wrong, message in (
        ({"temperature": -1}, "temperature is -1.*--generation-config vllm"),
        ({"top_p": "high"}, "top_p is 'high'"),
        ({"max_new_tokens": 0}, "max_tokens is 0"),
        ([], "expected a JSON object"),
    ):
        with pytest.raises(ModelError, match=message):
            generation_defaults("auto", write(tmp_path / "model", wrong))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        generation_defaults("auto", tmp_path)
    with pytest.raises(ModelError, match="eos_token_id is"):
        generation_end_ids(str(write(tmp_path / "model", {"eos_token_id": "x"})), tmp_path, 304)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_llama(tmp_path_factory.mktemp("defaults") / "model", seed=1, scale=0.2)
    return write(folder, {"do_sample": False, "max_new_tokens": 5, "repetition_penalty": 1.3})


def test_offline_batches_take_them(folder, tmp_path):
    llm = LLM(str(folder), **SMALL)
    assert llm.get_default_sampling_params() == SamplingParams(
        temperature=0.0, max_tokens=5, repetition_penalty=1.3
    )
    asked = greedy(5, ignore_eos=False, repetition_penalty=1.3)
    assert llm.generate(PROMPT)[0].token_ids == llm.generate(PROMPT, asked)[0].token_ids
    assert len(llm.generate(PROMPT, greedy(9))[0].token_ids) == 9  # what a request says goes first
    check_idle(llm.engine)


def test_several_ids_end_an_output(folder, tmp_path):
    free = LLM(str(folder), **SMALL).generate(PROMPT, greedy(20))[0].token_ids
    second, third = free[7], free[12]
    own = write(tmp_path / "own", {"eos_token_id": [299, third, second]})
    llm = LLM(str(folder), **SMALL, generation_config=str(own))
    (output,) = llm.generate(PROMPT, greedy(20, ignore_eos=False))
    stop = min(free.index(second), free.index(third))
    assert output.token_ids == free[: stop + 1]
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason is None  # an end token of the model's, none of the request's
    assert llm.generate(PROMPT, greedy(20))[0].token_ids == free
    check_idle(llm.engine)


def test_the_served_engine_takes_them(folder):
    for choice, expected in (
        ("auto", {"temperature": 0.0, "max_tokens": 5, "repetition_penalty": 1.3}),
        ("vllm", {}),
    ):
        engine = AsyncEngine(EngineConfig(model=str(folder), **SMALL, generation_config=choice))
        engine.start()

        async def ready(engine=engine):
            await engine.wait_ready()

        play(ready)
        assert engine.default_params == expected
        engine.shutdown()
