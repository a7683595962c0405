"""A fault in one request's own data, wherever the engine meets it, ends that request and no other."""

import pytest

from jinfer import SamplingParams
from jinfer.packing import _pack_chunk
from tests.support.engines import check_idle, collect, greedy, run_one
from tests.support.models import random_prompt

GOOD, BAD = random_prompt(950, 60), random_prompt(951, 60)


@pytest.fixture
def engine(warm_llm):
    yield warm_llm.engine
    check_idle(warm_llm.engine)


def run_beside(engine, params: SamplingParams, before: int = 0):
    """(the good request's output, the bad one's) run together, the good one some steps ahead."""
    engine.add_request("good", GOOD, params)
    deltas = [delta for _ in range(before) for delta in engine.step()]
    engine.add_request("bad", BAD, params)
    outputs = collect([*deltas, *engine.drain()])
    return outputs["good", 0], outputs["bad", 0]


def check(engine, params, output, bad, message):
    assert output.token_ids == run_one(engine, GOOD, params).token_ids
    assert output.finish_reason == "length"
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert message in (bad.deltas[-1].error or "")
    # What it was to write is not found by those who ask for the same later.
    assert run_one(engine, BAD, params).num_cached == 0


def is_bad(request) -> bool:
    return request.request_id == "bad"


def failing_for_bad(real, position=0):
    def function(*arguments):
        if is_bad(getattr(arguments[position], "request", arguments[position])):
            raise OverflowError("planted")
        return real(*arguments)

    return function


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("part", ["tables", "fields", "tokens"])
def test_in_packing(engine, monkeypatch, caplog, part, before):
    import jinfer.packing
    import jinfer.runner

    module, name = {
        "tables": (jinfer.runner, "slot_tables"),
        "fields": (jinfer.packing, "_admitted_fields"),
        "tokens": (jinfer.packing, "_pack_chunk"),
    }[part]
    params = greedy(6, repetition_penalty=1.1)
    monkeypatch.setattr(module, name, failing_for_bad(getattr(module, name)))
    good, bad = run_beside(engine, params, before)
    monkeypatch.undo()
    check(engine, params, good, bad, "OverflowError: planted")
    assert "bad" in caplog.text


def test_in_a_later_chunk(engine, monkeypatch):
    """The prompt is longer than a step: its first chunk ran, and its pages were findable."""

    def second(row, tokens, targets):
        if is_bad(row.request) and row.start:
            raise OverflowError("planted")
        return _pack_chunk(row, tokens, targets)

    monkeypatch.setattr("jinfer.packing._pack_chunk", second)
    params = greedy(6)
    good, bad = run_beside(engine, params)
    monkeypatch.undo()
    check(engine, params, good, bad, "planted")


def test_at_its_admission(engine, monkeypatch):
    sharing = engine.scheduler.running.sharing
    monkeypatch.setattr(sharing, "find", failing_for_bad(sharing.find))
    params = greedy(6)
    good, bad = run_beside(engine, params)
    monkeypatch.undo()
    check(engine, params, good, bad, "planted")


def test_of_the_only_request(engine, monkeypatch):
    monkeypatch.setattr("jinfer.packing._pack_chunk", failing_for_bad(_pack_chunk))
    engine.add_request("bad", BAD, greedy(6, n=3))
    outputs = collect(engine.drain())
    assert [output.finish_reason for output in outputs.values()] == ["error"] * 3
