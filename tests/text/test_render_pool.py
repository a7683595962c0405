"""Templates are rendered in small processes: what one of them does there harms nothing but its own request."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from jinfer.errors import RequestError, RequestFailedError
from jinfer.text import ChatTemplate
from jinfer.text import render_pool as pools
from jinfer.text.render_pool import RenderPool

HI = [{"role": "user", "content": "hi"}]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def pool():
    made = RenderPool(size=1)
    yield made
    made.close()


def template(source, pool, **limits):
    return ChatTemplate({"default": source}, pool=pool, **limits)


def memory_of(pid: int) -> int:
    """The most bytes that a process ever had."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


BIG = "{% set s = 'x' * 900000 %}"
HOSTILE = {
    "indent": "{% set s = '\n' * 90000 %}{{ s | indent(90000, true, true) }}",
    "join of a generator": BIG + "{{ s.join(range(90000) | map('string')) }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "repr of lists": "{% set ns = namespace(v=['x' * 9000]) %}{% for i in range(16) %}{% set ns.v = [ns.v, ns.v] %}"
    "{% endfor %}{{ ns.v | string }}",
    "tojson of shared lists": "{% set ns = namespace(v=['x' * 9000]) %}{% for i in range(30) %}"
    "{% set ns.v = [ns.v, ns.v] %}{% endfor %}{{ ns.v | tojson }}",
    "slices": BIG + "{{ s[::-1] | list | batch(1) | map('string') | list | string | length }}" * 3,
    "sorting for ever": "{% for i in range(99999) %}{% set x = range(99999) | sort(reverse=true) | list %}{% endfor %}",
    "a long product": "{% set ns = namespace(v=9) %}{% for i in range(99) %}{% set ns.v = ns.v * ns.v %}{% endfor %}",
    "deep recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_harms_its_own_request_only(pool, name):
    hostile = template(HOSTILE[name] + PLAIN, pool, max_seconds=0.3)
    peak = []
    kept = pool._give

    def watch(worker):
        if worker is not None:
            peak.append(memory_of(worker.pid))
        kept(worker)

    pool._give = watch
    start = time.thread_time()
    with pytest.raises(RequestError, match="the model's chat template cannot render") as caught:
        hostile.render(HI)
    assert time.thread_time() - start < 0.5  # of this process
    assert len(str(caught.value)) < 1000
    assert all(size < 300 * 1024 * 1024 for size in peak)
    assert template(PLAIN, pool).render(HI) == "hi"


def test_a_process_that_is_killed_costs_one_request(pool):
    slow = template(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", pool, max_seconds=60
    )
    quick = template(PLAIN, pool)
    assert quick.render(HI) == "hi"
    (pid,) = pool.pids()
    failed = []

    def render():
        try:
            slow.render(HI)
        except RequestError as error:
            failed.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    thread.join(30)
    assert "was ended" in failed[0]
    assert quick.render(HI) == "hi"
    assert pool.pids() != [pid]


def test_a_process_that_died_in_its_sleep_is_replaced(pool):
    quick = template(PLAIN, pool)
    assert quick.render(HI) == "hi"
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert quick.render(HI) == "hi"


@pytest.mark.parametrize(("name", "value"), [("_BOOT", "import nothing_of_this_name"), ("_path", list)])
def test_a_process_that_does_not_start_is_no_fault_of_the_messages(pool, monkeypatch, caplog, name, value):
    made = template(PLAIN, pool)
    with monkeypatch.context() as patch:
        patch.setattr(pools, name, value)
        with pytest.raises(RequestFailedError, match=r"did not start \(exit status 1\)"):
            made.render(HI)
        made.prepare()
        assert "did not start" in caplog.text
    assert made.render(HI) == "hi"


def test_a_terminals_interrupt_does_not_reach_it(pool):
    quick = template(PLAIN, pool)
    quick.render(HI)
    (pid,) = pool.pids()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert quick.render(HI) == "hi"
    assert pool.pids() == [pid]


def test_an_interrupted_caller_leaves_no_answer_behind(pool, monkeypatch):
    quick = template(PLAIN, pool)
    assert quick.render(HI) == "hi"

    def interrupted(self, seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pools.Connection, "poll", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quick.render([{"role": "user", "content": "first"}])
    assert quick.render([{"role": "user", "content": "second"}]) == "second"


def test_many_threads_share_few_processes():
    pool = RenderPool(size=2)
    sources = [f"{n}{PLAIN}" for n in range(20)]  # more than a process keeps
    templates = [template(source, pool) for source in sources]
    found = {}

    def render(n):
        found[n] = templates[n % 20].render([{"role": "user", "content": str(n)}])

    threads = [threading.Thread(target=render, args=(n,)) for n in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: f"{n % 20}{n}" for n in range(60)}
    assert len(pool.pids()) <= 2
    pool.close()


def test_it_ends_with_the_process_that_started_it():
    script = (
        "import os\n"
        "from jinfer.text.render_pool import shared_pool\n"
        "shared_pool().start()\n"
        "print(shared_pool().pids()[0], flush=True)\n"
        "os._exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.05)
    raise AssertionError("it lives on")


def test_it_imports_little():
    script = "import sys, json, jinfer.text.worker; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert {"jax", "numpy", "tokenizers", "transformers"}.isdisjoint(json.loads(done.stdout))


def test_no_secret_is_handed_on(pool, monkeypatch):
    monkeypatch.setenv("JINFER_API_KEY", "sesame")
    template(PLAIN, pool).render(HI)
    with open(f"/proc/{pool.pids()[0]}/environ", "rb") as file:
        assert b"sesame" not in file.read()


def test_messages_travel_as_they_are(pool):
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ n }}{{ big }}{{ x }}"
    text = "größer 日本 😀\x00\u2028 \ud800"
    shown = template(source, pool).render(
        [{"role": "user", "content": text}], chat_template_kwargs={"n": 1.5, "big": 2**100, "x": None}
    )
    assert shown == text + "1.5" + str(2**100) + "None"


def test_what_is_nested_too_deeply_is_refused(pool):
    deep: Any = "x"
    for _ in range(190):
        deep = {"a": deep}
    tools = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    shows = template("{% for t in tools or [] %}{{ t | tojson(indent=4) }}{% endfor %}" + PLAIN, pool)
    options: dict[str, Any]
    for options, param in (
        ({"tools": tools}, "tools"),
        ({"chat_template_kwargs": {"tools_": deep}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "x", "y": deep}]}, "messages"),
    ):
        with pytest.raises(RequestError, match="levels deep") as caught:
            shows.render(**{"messages": HI} | options)
        assert caught.value.param == param
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a":' * 100 + "1" + "}" * 100}}
    with pytest.raises(RequestError, match="levels deep"):
        shows.render([*HI, {"role": "assistant", "tool_calls": [call]}])
