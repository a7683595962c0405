"""Small schedulers and requests, and a way to run steps without a device."""

from typing import Any

import pytest

from jinfer.cache.groups import GroupSize
from jinfer.request import Request
from jinfer.sampling.params import SamplingParams
from jinfer.schedule.scheduler import Scheduler


@pytest.fixture
def make_scheduler():
    """`groups`: page groups; or `num_pages` of one group without a window."""

    def make(num_pages=65, **changes):
        settings: dict[str, Any] = {
            "groups": [GroupSize(num_pages)],
            "page_size": 4,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_model_len": 64,
            "max_num_waiting": 100,
        }
        return Scheduler(**(settings | changes))

    return make


@pytest.fixture
def make_request():
    """`prompt`: token ids, or a length (then the tokens of different requests differ from the first one on)."""
    made = []

    def make(prompt=4, max_tokens=8, **changes):
        made.append(None)
        tokens = (
            tuple(1000 * len(made) + i for i in range(prompt)) if isinstance(prompt, int) else tuple(prompt)
        )
        params = changes.pop("params", None) or SamplingParams(max_tokens=max_tokens)
        return Request(changes.pop("request_id", f"r{len(made)}"), tokens, params, **changes)

    return make


@pytest.fixture
def step():
    """Schedules a step and commits it at once, every token being `token`; returns the batch."""

    def run(scheduler, token=7):
        batch = scheduler.schedule()
        if batch is not None:
            scheduler.commit(batch, [token] * len(batch.rows))
        scheduler.check_integrity()
        return batch

    return run


@pytest.fixture
def finish_all(step):
    """Steps until nothing is left; returns the batches."""

    def run(scheduler):
        batches = []
        while scheduler.has_unfinished:
            batches.append(step(scheduler))
            assert batches[-1] is not None, "nothing runs and nothing will"
        return batches

    return run
