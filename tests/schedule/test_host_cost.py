"""Host work per step: the device must not wait for the plan."""

import statistics
import time

import pytest

from jinfer.cache.groups import GroupSize


@pytest.mark.parametrize("groups", [[GroupSize(2049)], [GroupSize(2049), GroupSize(2049, 100)]])
def test_a_decode_step_of_32_rows_costs_a_fraction_of_a_millisecond(make_scheduler, make_request, groups):
    s = make_scheduler(
        groups=groups, page_size=16, max_num_seqs=32, max_num_batched_tokens=512, max_model_len=1024
    )
    for _ in range(32):
        s.add(make_request(100, max_tokens=300, end_token_ids=frozenset({5})))
    seconds, waiting = [], None
    while s.has_unfinished:
        begin = time.perf_counter()
        batch = s.schedule()
        if waiting is not None:
            s.commit(waiting, [7] * len(waiting.rows))
        if batch is not None and batch.decode_only and len(batch.rows) == 32:
            seconds.append(time.perf_counter() - begin)
        waiting = batch
    assert len(seconds) > 250
    # Measured: 0.02 ms, 0.03 ms with a windowed group. All host work of a step, of which this is a part, has 1 ms.
    assert statistics.median(seconds) < 0.3e-3
