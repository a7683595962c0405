"""Groups of requests, of which each has a bounded share of the running places while there are others."""

import pytest

from jinfer.request import RequestState
from jinfer.sampling.params import SamplingParams

SIX = {"max_num_seqs": 6, "max_seqs_per_group": 2, "num_pages": 200, "max_num_batched_tokens": 64}


@pytest.fixture
def add_group(make_request):
    """Adds requests of one group to a scheduler: forks of one prompt, or `forks=False` separate prompts."""

    def add(scheduler, name, count, forks=True, max_tokens=8, prompt=3):
        leader, members = None, []
        for index in range(count):
            changes = {"request_id": name, "index": index, "leader": leader} if forks else {"group": name}
            request = make_request(prompt, max_tokens=max_tokens, **changes)
            scheduler.add(request)
            leader = leader or request
            members.append(request)
        return members

    return add


def is_running(request):
    return request.state is RequestState.RUNNING


@pytest.mark.parametrize("forks", [True, False])
def test_beside_others_a_group_has_its_share(make_scheduler, make_request, step, add_group, forks):
    s = make_scheduler(**SIX)
    other = make_request(3, max_tokens=30)
    s.add(other)
    many = add_group(s, "many", 5, forks)
    step(s)
    assert is_running(other)
    assert [is_running(r) for r in many] == [True, True, False, False, False]
    assert s.num_waiting == 3


def test_the_next_of_a_group_runs_when_one_has_ended(make_scheduler, make_request, step, add_group):
    s = make_scheduler(**SIX)
    s.add(make_request(3, max_tokens=60))
    many = add_group(s, "many", 5, max_tokens=4)
    most = []
    while not all(r.finished for r in many):
        step(s)
        most.append(sum(map(is_running, many)))
    assert max(most) == 2
    assert all(len(r.output_token_ids) == 4 for r in many)


def test_alone_a_group_has_every_place(make_scheduler, step, add_group):
    s = make_scheduler(**SIX)
    many = add_group(s, "many", 8)
    step(s)
    assert sum(map(is_running, many)) == 6


def test_a_group_takes_every_place_when_the_others_have_ended(make_scheduler, make_request, step, add_group):
    s = make_scheduler(**SIX)
    other = make_request(3, max_tokens=2)
    s.add(other)
    many = add_group(s, "many", 8)
    while not other.finished:
        step(s)
    step(s)
    assert sum(map(is_running, many)) == 6


def test_groups_that_all_want_more_divide_every_place(make_scheduler, make_request, step, add_group):
    s = make_scheduler(**SIX)
    one, two = add_group(s, "one", 9, forks=False, max_tokens=5), add_group(s, "two", 9, max_tokens=9)
    step(s)
    assert (sum(map(is_running, one)), sum(map(is_running, two))) == (3, 3)
    small = make_request(3, max_tokens=60)
    s.add(small)
    while sum(r.finished for r in one) < 3:
        step(s)
    step(s)
    assert is_running(small)
    assert sum(map(is_running, one)) == 2


def test_who_comes_later_has_a_place_at_once(make_scheduler, make_request, step, add_group):
    s = make_scheduler(**SIX)
    s.add(make_request(3, max_tokens=60))
    add_group(s, "many", 50, max_tokens=60)
    step(s)
    late = make_request(3)
    s.add(late)
    step(s)
    assert is_running(late)


def test_a_group_that_had_more_shrinks_to_its_share(make_scheduler, make_request, step, add_group):
    s = make_scheduler(**SIX)
    many = [
        r
        for tokens in (3, 4, 5, 6, 7, 8, 9, 10)
        for r in add_group(s, "many", 1, max_tokens=tokens, forks=False)
    ]
    step(s)
    assert sum(map(is_running, many)) == 6
    s.add(make_request(3, max_tokens=60))
    counts = [6]
    while not all(r.finished for r in many):
        step(s)
        counts.append(sum(map(is_running, many)))
    shrunk = next(at for at, count in enumerate(counts) if count <= 2)
    assert counts[:shrunk] == sorted(counts[:shrunk], reverse=True)
    assert max(counts[shrunk:]) == 2
    assert counts[shrunk:].count(2) > 2


def test_what_is_held_back_can_be_aborted(make_scheduler, make_request, step, finish_all, add_group):
    s = make_scheduler(**SIX)
    other = make_request(3, max_tokens=20)
    s.add(other)
    add_group(s, "many", 7)
    alone = add_group(s, "prompts", 7, forks=False)
    step(s)
    assert len(s.abort("many")) == 7
    s.check_integrity()
    assert len(s.abort(alone[5].request_id)) == 1
    s.check_integrity()
    assert s.num_waiting == 4
    finish_all(s)
    assert len(other.output_token_ids) == 20


def test_forks_keep_to_their_share_when_their_prompt_is_computed(
    make_scheduler, make_request, step, add_group
):
    s = make_scheduler(**SIX | {"max_num_batched_tokens": 6})
    s.add(make_request(3, max_tokens=60))
    many = add_group(s, "many", 6, prompt=20)
    for _ in range(6):
        step(s)
    assert sum(map(is_running, many)) == 2
    assert s.num_waiting == 4


def test_without_a_bound_a_group_takes_what_it_gets(make_scheduler, make_request, step, add_group):
    s = make_scheduler(**SIX | {"max_seqs_per_group": None})
    s.add(make_request(3, params=SamplingParams(max_tokens=60)))
    many = add_group(s, "many", 8)
    step(s)
    assert sum(map(is_running, many)) == 5
