"""docs/python.md: every example runs, one after the other, as it stands."""

import functools
import re
import signal
from pathlib import Path

from jinfer import EngineConfig, llm
from tests.support.engines import check_idle

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
# Fewer programs, compiled fast; they change no result.
QUICK = {"max_num_batched_tokens": 64, "warmup": False, "optimization_level": 0}


def test_every_example_runs(monkeypatch):
    monkeypatch.setattr(llm, "EngineConfig", functools.partial(EngineConfig, **QUICK))
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    names: dict = {}
    before = signal.getsignal(signal.SIGALRM)
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    check_idle(names["llm"].engine)
