"""Updates of the weights are all or nothing: faults at every parameter, refusals, and which version made a result."""

import asyncio
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer import (
    LLM,
    AsyncEngine,
    EngineConfig,
    FinishReason,
    ModelError,
    WeightsError,
    load_params,
    runner,
    weight_update,
)
from tests.support.engines import SMALL, check_idle, collect, greedy
from tests.support.models import GROUPED, make_llama, random_prompt

PROMPT = random_prompt(810, 33)
CALLS = {
    "generate": lambda llm: llm.generate(PROMPT, greedy(6)),
    "score": lambda llm: llm.score([PROMPT]),
    "embed": lambda llm: llm.embed([PROMPT]),
}


@pytest.fixture(scope="module")
def llm(tiny_llama):
    return LLM(str(tiny_llama), **SMALL)


@pytest.fixture(scope="module")
def params(tiny_llama, tmp_path_factory):
    other = make_llama(tmp_path_factory.mktemp("other") / "llama", seed=7, **GROUPED)
    return [load_params(str(tiny_llama)), load_params(str(other))]


@pytest.fixture(scope="module")
def expected(llm, params):
    """Greedy tokens with either set of weights."""
    found = []
    for one in params:
        llm.update_weights(one)
        found.append(tokens(llm))
    assert found[0] != found[1]
    return found


@pytest.fixture(autouse=True)
def old_weights(llm, params, expected):
    llm.update_weights(params[0])
    yield
    check_idle(llm.engine)


def tokens(llm):
    return llm.generate(PROMPT, greedy(6))[0].token_ids


def failing_at(monkeypatch, number, error):
    """Makes the placing of one parameter fail."""
    calls, real = 0, weight_update.place

    def place(array, target):
        nonlocal calls
        calls += 1
        if calls == number + 1:
            raise error
        return real(array, target)

    monkeypatch.setattr(runner, "place", place)


# Faults


def test_a_fault_at_any_parameter_never_leaves_a_mixture(llm, params, expected, monkeypatch):
    version = llm.weights_version
    assert tokens(llm) == expected[0]  # its pages are in the prefix cache
    for number in range(len(params[0].arrays)):
        error = [RuntimeError("RESOURCE_EXHAUSTED: out of memory"), TypeError("no such cast")][number % 2]
        with monkeypatch.context() as patch:
            failing_at(patch, number, error)
            if number == 0:
                with pytest.raises(ModelError, match="could not be placed.*nothing is changed"):
                    llm.update_weights(params[1])
                assert tokens(llm) == expected[0]
                continue
            with pytest.raises(WeightsError, match="could not be placed.*until a full update has succeeded"):
                llm.update_weights(params[1])
        assert llm.engine.runner.params == {}
        for call in CALLS.values():
            with pytest.raises(WeightsError, match="no weights"):
                call(llm)
        # What was wrong before is refused as before, and the state stays.
        with pytest.raises(ModelError, match="missing"):
            llm.update_weights({})
        with monkeypatch.context() as patch:
            failing_at(patch, 0, error)
            with pytest.raises(WeightsError):
                llm.update_weights(params[1])
        assert llm.weights_version == version
        if number % 9 == 1:
            llm.update_weights(params[1])
            assert tokens(llm) == expected[1]
            llm.update_weights(params[0])
            assert tokens(llm) == expected[0]
            version = llm.weights_version


@pytest.mark.parametrize("at", ["convert", "put", "wait"])
def test_faults_of_jax_itself_are_caught(llm, params, expected, monkeypatch, at):
    calls = 0

    def failing(*_, **__):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(*_, **__)

    target, name = {
        "convert": (weight_update, "_host_cast"),
        "put": (weight_update.jax, "device_put"),
        "wait": (weight_update.jax, "block_until_ready"),
    }[at]
    arrays = {path: np.asarray(array) for path, array in params[1].arrays.items()}
    with monkeypatch.context() as patch:
        if at == "convert":  # it converts in the check too, where a fault changes nothing
            patch.setattr(weight_update, "_is_finite", lambda *_: True)
        real = getattr(target, name)
        patch.setattr(target, name, failing)
        with pytest.raises(WeightsError, match="RESOURCE_EXHAUSTED"):
            llm.update_weights(arrays)
    llm.update_weights(arrays)
    assert tokens(llm) == expected[1]


def test_an_interrupt_comes_after_the_update(llm, params, expected, monkeypatch):
    real = weight_update.place

    def place(array, target):
        signal.raise_signal(signal.SIGINT)
        return real(array, target)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "place", place)
        with pytest.raises(KeyboardInterrupt):
            llm.update_weights(params[1])
    assert tokens(llm) == expected[1]


def test_an_exception_from_another_thread_is_a_fault_too(llm, params, expected, monkeypatch):
    with monkeypatch.context() as patch:
        failing_at(patch, 5, SystemExit())
        with pytest.raises(SystemExit):
            llm.update_weights(params[1])
    with pytest.raises(WeightsError):
        tokens(llm)
    llm.update_weights(params[1])
    assert tokens(llm) == expected[1]


def test_what_runs_fails_with_an_update_that_fails_midway(llm, params, expected, monkeypatch):
    engine = llm.engine
    for name in ("a", "b"):
        engine.add_request(name, PROMPT, greedy(40))
    deltas = [delta for _ in range(5) for delta in engine.step()]
    with monkeypatch.context() as patch:
        failing_at(patch, 0, MemoryError())
        with pytest.raises(ModelError):
            engine.update_weights(params[1])
        deltas += engine.step()  # goes on with the old ones
        failing_at(patch, 3, MemoryError())
        with pytest.raises(WeightsError):
            engine.update_weights(params[1])
    outputs = collect([*deltas, *engine.drain()])
    for name in ("a", "b"):
        assert outputs[name, 0].finish_reason == FinishReason.ERROR.value
        assert "update of the weights failed" in (outputs[name, 0].deltas[-1].error or "")
    assert outputs["a", 0].token_ids[:6] == expected[0][: len(outputs["a", 0].token_ids)]
    check_idle(engine)
    llm.update_weights(params[1])
    assert tokens(llm) == expected[1]


def test_one_parameter_at_most_is_there_twice(llm, params, monkeypatch):
    own, most = set(llm.engine.runner.params), 0
    real = weight_update.place

    def place(array, target):
        nonlocal most
        new = real(array, target)
        most = max(most, sum(x.nbytes for x in jax.live_arrays()))
        return new

    before = sum(x.nbytes for x in jax.live_arrays())
    with monkeypatch.context() as patch:
        patch.setattr(runner, "place", place)
        llm.update_weights(params[1])
    assert set(llm.engine.runner.params) == own
    assert most - before <= max(x.nbytes for x in params[1].arrays.values())


# Refusals


def changed(params, path, value):
    return {**params.arrays, path: value(params.arrays[path])}


PATH = "norm.weight"
REFUSED = {
    "NaN": (lambda x: x.at[3].set(jnp.nan), "norm.weight has values that are not finite"),
    "infinity": (lambda x: np.asarray(x.at[3].set(-jnp.inf)), "not finite"),
    "too large for the engine's dtype": (
        lambda x: np.asarray(x, np.float64) * 1e300,
        "not finite as float32",
    ),
    "integers": (lambda x: x.astype(jnp.int8), "dtype int8, expected a floating"),
    "complex numbers": (lambda x: x.astype(jnp.complex64), "dtype complex64"),
    "keys": (lambda x: jax.random.split(jax.random.key(0), 64), "dtype key"),
    "no array": (lambda x: object(), r"dtype object|shape \(\)"),
    "text": (lambda x: ["a"] * 64, "dtype <U1"),
    "unequal rows": (lambda x: [[1.0], [1.0, 2.0]], "is a list, expected an array"),
    "nothing": (lambda x: None, "shape"),
    "another shape": (lambda x: x[None], r"shape \(1, 64\), expected \(64,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_weight_is_refused_and_nothing_changes(llm, params, expected, case):
    value, message = REFUSED[case]
    version, before = llm.weights_version, dict(llm.engine.runner.params)
    with pytest.raises(ModelError, match=message):
        llm.update_weights(changed(params[1], PATH, value))
    assert llm.weights_version == version
    assert all(llm.engine.runner.params[path] is array for path, array in before.items())


def test_deleted_and_traced_parameters_and_other_objects_are_refused(llm, params, expected):
    gone = jnp.ones(64)
    gone.delete()
    with pytest.raises(ModelError, match="deleted or donated"):
        llm.update_weights({**params[1].arrays, PATH: gone})
    with pytest.raises(ModelError, match="is being traced"):
        jax.jit(lambda x: llm.update_weights({**params[1].arrays, PATH: x}))(params[1].arrays[PATH])
    with pytest.raises(ModelError, match="a list was given, expected Params or a mapping"):
        llm.update_weights(list(params[1].arrays.values()))  # type: ignore[arg-type]
    assert tokens(llm) == expected[0]


def test_arrays_of_the_host_are_copied(llm, params, expected):
    arrays = {path: np.array(array) for path, array in params[1].arrays.items()}
    llm.update_weights(arrays)
    for array in arrays.values():
        array[...] = 0
    assert tokens(llm) == expected[1]


def test_half_precision_is_converted(llm, params):
    half = {path: array.astype(jnp.float16) for path, array in params[1].arrays.items()}
    llm.update_weights(half)
    assert {array.dtype.name for array in llm.engine.runner.params.values()} == {"float32"}
    tokens(llm)


# Versions


def test_results_say_which_version_made_them(llm, params):
    start = llm.weights_version
    for version in range(start, start + 3):
        assert llm.weights_version == llm.engine.weights_version == version
        for call in CALLS.values():
            assert [output.weights_version for output in call(llm)] == [version]
        with pytest.raises(ModelError):
            llm.update_weights({})
        llm.update_weights(params[version % 2])


def test_each_delta_says_which_version_made_it(llm, params):
    engine, version = llm.engine, llm.weights_version
    engine.add_request("r", PROMPT, greedy(12))
    deltas = []
    while len(deltas) < 4:
        deltas += engine.step()
    engine.update_weights(params[1])
    deltas += engine.drain()
    # One more step of the old weights was under way.
    assert [delta.weights_version - version for delta in deltas] == [0] * 5 + [1] * 7


def test_the_asynchronous_engine_goes_on_after_a_failed_update(tiny_llama, params, expected, monkeypatch):
    engine = AsyncEngine(EngineConfig(model=str(tiny_llama), **SMALL))
    engine.start()

    async def answer(name):
        return [delta async for delta in engine.generate(PROMPT, greedy(6), request_id=name)]

    async def scenario():
        await engine.wait_ready()
        assert {delta.weights_version for delta in await answer("old")} == {0} == {engine.weights_version}
        with monkeypatch.context() as patch:
            failing_at(patch, 3, MemoryError())
            with pytest.raises(WeightsError):
                await engine.update_weights(params[1])
        assert engine.is_healthy
        assert not engine.is_ready
        with pytest.raises(WeightsError):
            await answer("none")
        await engine.update_weights(params[1])
        assert engine.is_ready
        deltas = await answer("new")
        assert [token for delta in deltas for token in delta.token_ids] == expected[1]
        assert {delta.weights_version for delta in deltas} == {1} == {engine.weights_version}
        await engine.check_integrity()

    asyncio.run(scenario())
    engine.shutdown()
