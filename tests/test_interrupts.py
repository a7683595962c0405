"""Ctrl-C and alarms at any time, faults in a step, and several threads: the engine goes on as if nothing had been."""

import contextlib
import random
import signal
import threading
import time

import jax
import pytest
from tqdm import tqdm

from jinfer import RequestError
from jinfer.interrupts import held_signals, uninterrupted
from jinfer.text.render_pool import shared_pool
from tests.support.engines import check_idle, greedy
from tests.support.models import random_prompt

PROMPTS = [random_prompt(700 + i, 20 + i) for i in range(3)]
BIASED = greedy(5, logit_bias={65: 1.0})  # its tables go to the device when it is admitted


class Alarm(BaseException):
    pass


def ring(*_):
    raise Alarm


@pytest.fixture
def alarm():
    """Sets SIGALRM off after so many seconds; 0: not any more."""
    before = signal.signal(signal.SIGALRM, ring)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


CALLS = {
    "generate": lambda llm: [o.token_ids for o in llm.generate(PROMPTS, BIASED)],
    "score": lambda llm: [s.logprobs for s in llm.score(PROMPTS)],
    "embed": lambda llm: [e.embedding.tolist() for e in llm.embed(PROMPTS)],
    "chat": lambda llm: [o.token_ids for o in llm.chat([{"role": "user", "content": "hi"}], BIASED)],
}


@pytest.fixture(scope="module")
def expected(warm_llm):
    return {name: call(warm_llm) for name, call in CALLS.items()}


def test_interrupts_at_any_time_leave_an_engine_that_goes_on(warm_llm, expected, alarm):
    random_times, hits = random.Random(0), 0
    for number in range(160):
        call = list(CALLS.values())[number % len(CALLS)]
        try:
            alarm(random_times.uniform(1e-4, 0.03))
            call(warm_llm)
            alarm(0)
        except Alarm:
            hits += 1
        check_idle(warm_llm.engine)
    assert hits >= 40
    assert {name: call(warm_llm) for name, call in CALLS.items()} == expected
    assert signal.getsignal(signal.SIGALRM) is ring


def test_an_engine_used_by_hand_is_not_interrupted_within_a_step(warm_llm, expected, alarm):
    engine, random_times, hits = warm_llm.engine, random.Random(1), 0
    for number in range(40):
        try:
            alarm(random_times.uniform(1e-4, 0.01))
            engine.add_request(f"r{number}", PROMPTS[0], BIASED)
            while engine.has_unfinished:
                engine.step()
            alarm(0)
        except Alarm:
            hits += 1
        alarm(0)
        engine.abort(f"r{number}")
        list(engine.drain())
        check_idle(engine)
    assert hits >= 10
    assert CALLS["generate"](warm_llm) == expected["generate"]


@pytest.mark.parametrize("interrupt", [False, True])
def test_a_progress_bar_is_gone_before_signals_are_handled_again(
    warm_llm, expected, monkeypatch, alarm, interrupt
):
    """Python drops what a handler raises within a finalizer: the interrupt would be lost."""
    handlers, step = [], warm_llm.engine.step

    class Bar(tqdm):
        def __del__(self):
            handlers.append(signal.getsignal(signal.SIGALRM))
            super().__del__()

    def stepping():
        if interrupt:
            signal.raise_signal(signal.SIGALRM)
        return step()

    with monkeypatch.context() as patch:
        patch.setattr("jinfer.llm.tqdm", Bar)
        patch.setattr(warm_llm.engine, "step", stepping)
        with pytest.raises(Alarm) if interrupt else contextlib.nullcontext():
            warm_llm.generate(PROMPTS[:1] * 8, greedy(1))
    assert len(handlers) == 1
    assert handlers[0] is not ring
    check_idle(warm_llm.engine)


# Faults that no holding back prevents


@pytest.mark.parametrize("lost", ["kv", "slots"])
def test_lost_buffers_are_made_anew(warm_llm, expected, monkeypatch, lost):
    runner, calls = warm_llm.engine.runner, 0
    dispatch = runner.dispatch

    def failing(batch):
        nonlocal calls
        calls += 1
        if calls == 3:
            for array in jax.tree.leaves(getattr(runner, lost)):
                array.delete()
        return dispatch(batch)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "dispatch", failing)
        with pytest.raises(Exception, match="has been deleted"):
            warm_llm.generate(PROMPTS, BIASED)
    check_idle(warm_llm.engine)
    assert {name: call(warm_llm) for name, call in CALLS.items()} == expected


def test_requests_whose_keys_are_lost_end_with_an_error(warm_llm, expected):
    engine = warm_llm.engine
    engine.add_request("r", PROMPTS[0], greedy(5))
    engine.step()
    for array in jax.tree.leaves(engine.runner.kv):
        array.delete()
    with pytest.raises(Exception, match="has been deleted"):
        list(engine.drain())
    (delta,) = engine.drain()
    assert delta.finish_reason is not None
    assert delta.finish_reason.value == "error"
    assert "keys and values of all requests are lost" in (delta.error or "")
    check_idle(engine)
    assert CALLS["generate"](warm_llm) == expected["generate"]


def test_a_batch_whose_end_was_cut_off_is_ended_by_the_next(warm_llm, expected, monkeypatch):
    def cut_off(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(warm_llm.engine, "_text_of", cut_off)
        patch.setattr(warm_llm.engine, "abort", cut_off)
        with pytest.raises(SystemExit):
            warm_llm.generate(PROMPTS, BIASED)
    assert warm_llm.engine.has_unfinished
    assert CALLS["generate"](warm_llm) == expected["generate"]
    check_idle(warm_llm.engine)


# Threads


def test_calls_of_several_threads_wait_for_each_other(warm_llm, expected):
    wrong: list[object] = []

    def work(name):
        try:
            for _ in range(4):
                assert CALLS[name](warm_llm) == expected[name]
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in CALLS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    check_idle(warm_llm.engine)


def test_a_call_from_within_a_call_is_refused(warm_llm, expected, monkeypatch, alarm):
    refused, step = [], warm_llm.engine.step

    def again(*_):
        for call in (lambda: CALLS["score"](warm_llm), lambda: warm_llm.update_weights({})):
            with pytest.raises(RequestError, match="in the middle of another call of the same thread"):
                call()
            refused.append(call)

    def interrupted():
        signal.raise_signal(signal.SIGALRM)
        return step()

    signal.signal(signal.SIGALRM, again)
    with monkeypatch.context() as patch:
        patch.setattr(warm_llm.engine, "step", interrupted)
        assert CALLS["generate"](warm_llm) == expected["generate"]
    assert len(refused) >= 2
    check_idle(warm_llm.engine)


def test_a_call_that_waits_for_another_thread_can_be_interrupted(warm_llm, expected, alarm):
    held, done = threading.Event(), threading.Event()

    def hold():
        with held_signals() as signals, warm_llm._turn(signals):
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    try:
        alarm(0.05)
        with pytest.raises(Alarm):
            CALLS["generate"](warm_llm)
    finally:
        done.set()
        thread.join(30)
    assert CALLS["generate"](warm_llm) == expected["generate"]


# Handlers that are held back


def test_a_held_signal_is_handled_once_at_the_end(alarm):
    heard = []
    with pytest.raises(Alarm):
        with held_signals(), held_signals() as signals:
            for _ in range(2):
                signal.raise_signal(signal.SIGALRM)
                time.sleep(0)
            heard.append("within")
            assert len(signals.pending) == 1
    assert heard == ["within"]
    assert signal.getsignal(signal.SIGALRM) is ring
    with held_signals():
        pass


def test_held_signals_are_delivered_on_request(alarm):
    with held_signals() as signals:
        signals.deliver()
        signal.raise_signal(signal.SIGALRM)
        with pytest.raises(Alarm):
            signals.deliver()
        signals.deliver()
        # Held again, though the handler raised.
        signal.raise_signal(signal.SIGALRM)
        signals.pending.clear()
    assert signal.getsignal(signal.SIGALRM) is ring


def test_every_held_signal_is_handled_though_the_first_handler_raises(alarm):
    with pytest.raises((Alarm, KeyboardInterrupt)) as caught:
        with held_signals():
            signal.raise_signal(signal.SIGALRM)
            signal.raise_signal(signal.SIGINT)
    kinds = {type(caught.value), type(caught.value.__context__)}
    assert kinds == {Alarm, KeyboardInterrupt}


def test_a_handler_may_install_another(alarm):
    heard = []

    def first(*_):
        signal.signal(signal.SIGALRM, lambda *_: heard.append("second"))
        heard.append("first")

    signal.signal(signal.SIGALRM, first)
    with held_signals() as signals:
        signal.raise_signal(signal.SIGALRM)
        signals.deliver()
        signal.raise_signal(signal.SIGALRM)
        assert heard == ["first"]
    assert heard == ["first", "second"]


def test_ignored_signals_stay_ignored_and_other_threads_hold_nothing(alarm):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    with held_signals():
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
        signal.raise_signal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, ring)
    found = []

    @uninterrupted
    def look():
        found.append(signal.getsignal(signal.SIGALRM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [ring]


def test_interrupted_renderings_keep_their_processes(warm_llm, alarm):
    """One that an interrupt took from the pool for good would make all chats wait."""
    template, random_times, hits = warm_llm.engine.chat_template, random.Random(2), 0
    chat = [{"role": "user", "content": "hi"}]
    expected = template.render(chat)
    pids = shared_pool().pids()
    for _ in range(100):
        try:
            alarm(random_times.uniform(1e-4, 0.003))
            template.render(chat)
            alarm(0)
        except Alarm:
            hits += 1
    assert hits >= 10
    assert shared_pool().pids() == pids
    assert template.render(chat) == expected
