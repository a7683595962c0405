"""Sequences whose KV changes where they grow beyond a length: computed anew there, once, and not shared."""

import pytest

from jinfer.request import RequestState

BEYOND = 10


@pytest.fixture
def scheduler(make_scheduler):
    return make_scheduler(recompute_beyond=BEYOND)


def chunks_of(request, batches):
    """(start, count) of its rows that are not single decoded tokens."""
    rows = [row for batch in batches for row in batch.rows if row.request is request]
    return [(row.start, row.count) for row in rows if not row.from_slot]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (4, [(0, 4), (0, 11)]),
        (10, [(0, 10), (0, 11)]),
        (11, [(0, 11)]),
        (12, [(0, 12)]),
    ],
)
def test_it_is_computed_anew_once(scheduler, make_request, finish_all, prompt, expected):
    request, other = make_request(prompt, max_tokens=12), make_request(1, max_tokens=3)
    for one in (request, other):
        scheduler.add(one)
    batches = finish_all(scheduler)
    assert chunks_of(request, batches) == expected
    assert chunks_of(other, batches) == [(0, 1)]
    assert len(request.output_token_ids) == 12
    assert request.num_recomputed == max(11, prompt)
    assert other.num_recomputed == 0


def test_one_that_ends_at_the_length_is_not(scheduler, make_request, finish_all):
    request = make_request(4, max_tokens=7)  # its 11th token is sampled, and never computed
    scheduler.add(request)
    assert chunks_of(request, finish_all(scheduler)) == [(0, 4)]
    assert scheduler.preemptions == 0


def test_it_waits_for_its_token_in_flight(scheduler, make_request):
    """With the last step not committed, as when steps overlap."""
    request = make_request(9, max_tokens=12)
    scheduler.add(request)
    first = scheduler.schedule()
    second = scheduler.schedule()
    scheduler.commit(first, [7])
    assert scheduler.schedule() is None
    assert (request.state, request.num_in_flight) == (RequestState.WAITING, 1)
    scheduler.commit(second, [7])
    (row,) = scheduler.schedule().rows
    assert (row.start, row.count) == (0, 11)


def test_pages_of_the_two_lengths_are_not_mixed(scheduler, make_request, finish_all):
    prompt = range(9)
    first = make_request(prompt, max_tokens=8)
    scheduler.add(first)
    finish_all(scheduler)
    assert not first.cacheable
    short, long = make_request(prompt, max_tokens=1), make_request([*prompt, 7, 7, 7, 7], max_tokens=1)
    for one in (short, long):
        scheduler.add(one)
    batches = finish_all(scheduler)
    assert chunks_of(short, batches) == [(8, 1)], "pages from before the length was reached are good"
    assert chunks_of(long, batches)[0][0] == 0, "a sequence that is longer has none"
