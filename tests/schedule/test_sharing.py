"""The prefix cache at work: who finds which pages, who must not, and how forks share their leader's prompt."""

import pytest

from jinfer.request import FinishReason, RequestState
from jinfer.sampling.params import SamplingParams
from jinfer.schedule import sharing

PROMPT = range(1, 15)  # three full pages of four, and two tokens more


def run_one(s, request, finish_all):
    s.add(request)
    finish_all(s)
    return request.num_cached


def test_a_prompt_seen_before_is_found_by_full_pages(make_scheduler, make_request, finish_all):
    s = make_scheduler()
    assert run_one(s, make_request(PROMPT), finish_all) == 0
    assert run_one(s, make_request(PROMPT), finish_all) == 12
    assert run_one(s, make_request([*PROMPT][:9] + [99] * 9), finish_all) == 8
    assert run_one(s, make_request([*PROMPT][:3] + [99] * 9), finish_all) == 0
    assert (s.prefix_queries, s.prefix_hits) == (14 + 14 + 18 + 12, 12 + 8)


def test_the_last_token_is_always_computed(make_scheduler, make_request, step, finish_all):
    s = make_scheduler()
    run_one(s, make_request(range(8), max_tokens=1), finish_all)
    s.add(make_request(range(8), max_tokens=1))
    row = step(s).rows[0]
    assert (row.start, row.count, row.new_page_start, len(row.new_pages[0])) == (4, 4, 0, 2)


def test_a_conversation_finds_its_own_output(make_scheduler, make_request, finish_all):
    s = make_scheduler()
    first = make_request(range(1, 6), max_tokens=8)
    run_one(s, first, finish_all)
    turn = [*range(1, 6), *first.output_token_ids, 50, 51]
    assert run_one(s, make_request(turn), finish_all) == 12


@pytest.mark.parametrize("overlap", [False, True])
def test_a_page_filled_by_an_end_token_is_found_only_if_its_kv_is_dispatched(
    make_scheduler, make_request, step, overlap
):
    s = make_scheduler()
    request = make_request(range(3), end_token_ids=frozenset({9}))
    s.add(request)
    first = s.schedule()
    second = s.schedule() if overlap else None
    s.commit(first, [9])
    if second:
        s.commit(second, [1])
    s.check_integrity()
    again = make_request([0, 1, 2, 9, 9])
    s.add(again)
    step(s)
    assert again.num_cached == (4 if overlap else 0)


def test_pages_are_shared_while_in_use(make_scheduler, make_request, step):
    s = make_scheduler()
    s.add(make_request(PROMPT))
    (first,) = step(s).rows
    s.add(make_request(PROMPT))
    second = step(s).rows[1]
    assert second.new_pages[0][:3] == first.new_pages[0][:3]
    assert s.groups[0].pool.num_used == 5
    s.abort("r1")
    s.check_integrity()
    assert s.groups[0].pool.num_used == 4


def test_rows_of_the_step_that_fills_a_page_do_not_find_it(make_scheduler, make_request, step):
    s = make_scheduler(max_num_batched_tokens=64)
    s.add(make_request(PROMPT))
    s.add(make_request(PROMPT))
    first, second = step(s).rows
    assert second.start == 0
    assert not set(first.new_pages[0]) & set(second.new_pages[0])


def test_a_newcomer_does_not_find_the_page_that_a_running_prompt_fills_in_the_same_step(
    make_scheduler, make_request, step
):
    s = make_scheduler()
    s.add(make_request(range(21)))
    step(s)
    s.add(make_request(range(21)))
    assert [(row.start, row.count) for row in step(s).rows] == [(16, 5), (16, 5)]


@pytest.mark.parametrize("changes", [{"cache_salt": "b"}, {"cache_salt": "a", "cacheable": False}])
def test_other_salts_and_uncacheable_requests_find_nothing(make_scheduler, make_request, finish_all, changes):
    s = make_scheduler()
    run_one(s, make_request(PROMPT, cache_salt="a"), finish_all)
    assert run_one(s, make_request(PROMPT, **changes), finish_all) == 0
    assert run_one(s, make_request(PROMPT, cache_salt="a"), finish_all) == 12


def test_an_uncacheable_request_leaves_nothing(make_scheduler, make_request, finish_all):
    s = make_scheduler()
    run_one(s, make_request(PROMPT, cacheable=False), finish_all)
    assert s.groups[0].pool.num_cached == 0
    assert run_one(s, make_request(PROMPT), finish_all) == 0


def test_logprobs_of_the_prompt_need_all_of_it_computed(make_scheduler, make_request, finish_all):
    s = make_scheduler()
    run_one(s, make_request(PROMPT), finish_all)
    params = SamplingParams(prompt_logprobs=0)
    queries = s.prefix_queries
    assert run_one(s, make_request(PROMPT, params=params), finish_all) == 0
    assert s.prefix_queries == queries


def test_the_least_recently_used_prompt_is_evicted_from_its_end(make_scheduler, make_request, finish_all):
    s = make_scheduler(num_pages=9)
    old, new = range(100, 112), range(200, 212)
    run_one(s, make_request(old, max_tokens=1), finish_all)
    run_one(s, make_request(new, max_tokens=1), finish_all)
    assert (s.groups[0].pool.num_cached, s.groups[0].pool.num_free) == (6, 2)
    run_one(s, make_request(12, max_tokens=1, cacheable=False), finish_all)
    assert run_one(s, make_request(old, max_tokens=1, cacheable=True), finish_all) == 8
    assert run_one(s, make_request(new, max_tokens=1), finish_all) == 8


def test_after_a_reset_nothing_old_is_found_and_what_runs_offers_nothing(
    make_scheduler, make_request, step, finish_all
):
    s = make_scheduler()
    run_one(s, make_request(range(50, 60)), finish_all)
    running = make_request(PROMPT, max_tokens=20)
    s.add(running)
    step(s)
    s.reset_prefix_cache()
    assert run_one(s, make_request(range(50, 60), max_tokens=20), finish_all) == 0
    assert running.finished
    # Its later pages stand behind the old beginning. They must not be found behind the new one either.
    assert run_one(s, make_request(PROMPT, max_tokens=1), finish_all) == 0
    assert run_one(s, make_request([*PROMPT, *running.output_token_ids]), finish_all) == 12


def test_each_page_is_hashed_once(make_scheduler, make_request, finish_all, monkeypatch):
    hashed = []

    def page_key(parent, tokens):
        hashed.append((parent, tuple(tokens)))
        return real(parent, tokens)

    real = sharing.page_key
    monkeypatch.setattr(sharing, "page_key", page_key)
    s = make_scheduler(num_pages=7)
    requests = [make_request(8, max_tokens=13), make_request(8, max_tokens=13)]
    for request in requests:
        s.add(request)
    finish_all(s)
    assert s.preemptions > 0
    # 20 of each one's 21 tokens are computed: five pages.
    assert len(hashed) == len(set(hashed)) == 10


def test_waste_is_what_pages_in_use_do_not_hold(make_scheduler, make_request, step):
    s = make_scheduler(max_num_batched_tokens=64)
    s.add(make_request(PROMPT))
    step(s)
    assert (s.allocated_tokens, s.used_tokens) == (16, 14)
    s.add(make_request(PROMPT))
    step(s)  # 15 tokens in four pages, and two more in one page behind three shared ones
    assert (s.allocated_tokens, s.used_tokens) == (16 + 20, 14 + 17)


# ---- forks


def group(make_request, n, prompt=PROMPT, **changes):
    leader = make_request(prompt, request_id="g", **changes)
    forks = [make_request(prompt, request_id="g", index=i, leader=leader, **changes) for i in range(1, n)]
    return [leader, *forks]


@pytest.mark.parametrize("caching", [True, False])
def test_forks_wait_for_their_leaders_prompt_and_share_it(make_scheduler, make_request, step, caching):
    s = make_scheduler(max_num_batched_tokens=8, enable_prefix_caching=caching)
    members = group(make_request, 3, cache_salt="group")
    for request in members:
        s.add(request)
    assert [[row.request.index for row in step(s).rows] for _ in range(2)] == [[0], [0]]
    assert s.num_waiting == 2
    batch = step(s)
    assert [(row.request.index, row.start, row.count) for row in batch.rows] == [
        (0, 14, 1),
        (1, 12, 2),
        (2, 12, 2),
    ]
    assert [r.num_cached for r in members] == [0, 12, 12]
    assert s.groups[0].pool.num_used == 3 + 3


def test_without_prefix_caching_only_forks_look_up(make_scheduler, make_request, finish_all):
    s = make_scheduler(enable_prefix_caching=False)
    run_one(s, make_request(PROMPT), finish_all)
    assert run_one(s, make_request(PROMPT), finish_all) == 0
    assert s.prefix_queries == 0


@pytest.mark.parametrize("changes", [{"prompt": range(4)}, {"cacheable": False}])
def test_forks_with_nothing_to_share_do_not_wait(make_scheduler, make_request, step, changes):
    s = make_scheduler(max_num_batched_tokens=64)
    for request in group(make_request, 3, **changes):
        s.add(request)
    assert [row.request.index for row in step(s).rows] == [0, 1, 2]


def test_requests_behind_parked_forks_are_not_blocked(make_scheduler, make_request, step):
    s = make_scheduler(max_num_batched_tokens=20)
    for request in group(make_request, 2):
        s.add(request)
    s.add(make_request(30))
    assert [row.request.request_id for row in step(s).rows] == ["g", "r3"]


@pytest.mark.parametrize("leader_runs", [True, False])
def test_forks_go_on_without_a_leader_that_has_ended(
    make_scheduler, make_request, step, finish_all, leader_runs
):
    s = make_scheduler(max_num_batched_tokens=8)
    leader, fork = group(make_request, 2)
    s.add(leader)
    s.add(fork)
    if leader_runs:
        step(s)
    s.finish(leader, FinishReason.ERROR)
    assert s.num_waiting == 1
    finish_all(s)
    assert len(fork.output_token_ids) == 8
    assert fork.num_cached == (8 if leader_runs else 0)


def test_forks_wait_on_through_their_leaders_preemption(make_scheduler, make_request, step, finish_all):
    s = make_scheduler(num_pages=12, max_num_seqs=3, max_num_batched_tokens=3)
    old = make_request(2, max_tokens=30)
    s.add(old)
    step(s)
    leader, fork = group(make_request, 2, prompt=range(1, 29), max_tokens=2)
    s.add(leader)
    s.add(fork)
    while not leader.num_preemptions:
        step(s)
    assert leader.num_computed == 0
    assert fork.state is RequestState.WAITING
    finish_all(s)
    assert [len(r.output_token_ids) for r in (leader, fork)] == [2, 2]


def test_an_abort_ends_the_whole_group(make_scheduler, make_request, step):
    s = make_scheduler(max_num_batched_tokens=8)
    members = group(make_request, 3)
    for request in members:
        s.add(request)
    step(s)
    assert s.abort("g") == members
    assert (s.num_running, s.num_waiting, s.kv_usage) == (0, 0, 0)
    s.check_integrity()


def test_a_fork_added_late_is_queued_at_once(make_scheduler, make_request, step):
    s = make_scheduler()
    leader, fork = group(make_request, 2)
    s.add(leader)
    step(s)
    s.add(fork)
    assert [row.request.index for row in step(s).rows] == [0, 1]
    assert fork.num_cached == 12
