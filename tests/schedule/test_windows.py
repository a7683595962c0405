"""Page groups with a sliding window: what they keep, what they give back, and what of a prefix is still of use."""

import pytest

from jinfer.cache.groups import GroupSize
from jinfer.cache.prefix import page_key, root_key
from jinfer.errors import RequestError
from jinfer.schedule.entry import Entry

FULL, WINDOW = GroupSize(65), GroupSize(65, 6, num_layers=5)
PROMPT = range(1, 43)  # ten full pages of four, and two tokens more


def held(s, place=1, index=0):
    return s.running.entries[index].held[place]


def run_one(s, request, finish_all):
    s.add(request)
    finish_all(s)
    return request.num_cached


def test_pages_before_the_window_are_given_back_as_the_sequence_advances(make_scheduler, make_request, step):
    s = make_scheduler(groups=[FULL, WINDOW], max_num_batched_tokens=8)
    s.add(make_request(42, max_tokens=20))
    counts = []
    while s.has_unfinished:
        step(s)
        if s.running.entries:
            counts.append((len(held(s, 0)), len(held(s, 1)), s.groups[1].pool.num_used))
    prefill, decode = counts[:6], counts[6:]
    assert [full for full, *_ in prefill] == [2, 4, 6, 8, 10, 11]
    # A chunk of two pages and the five tokens before it, which reach into two more.
    assert [windowed for _, windowed, _ in prefill] == [2, 4, 4, 4, 4, 3]
    assert {windowed for _, windowed, _ in decode} == {2, 3}
    assert all(windowed == used for _, windowed, used in counts)


def test_the_null_page_stands_for_what_a_group_does_not_need(make_scheduler, make_request, step, finish_all):
    s = make_scheduler(groups=[FULL, WINDOW])
    run_one(s, make_request(PROMPT, max_tokens=1), finish_all)
    s.add(make_request(PROMPT, max_tokens=1))
    row = step(s).rows[0]
    assert (row.start, row.new_page_start) == (40, 0)
    full, windowed = row.new_pages
    assert len(full) == len(windowed) == 11
    assert 0 not in full
    # Position 40 sees positions 35 to 39: pages 8 and 9.
    assert [page > 0 for page in windowed] == [False] * 8 + [True] * 3


def test_without_a_full_group_a_row_brings_only_what_its_window_reaches(
    make_scheduler, make_request, step, finish_all
):
    s = make_scheduler(groups=[WINDOW])
    run_one(s, make_request(PROMPT, max_tokens=1), finish_all)
    s.add(make_request(PROMPT, max_tokens=1))
    row = step(s).rows[0]
    assert (row.start, row.new_page_start, len(row.new_pages[0])) == (40, 8, 3)


def test_a_prefix_needs_only_its_last_window_in_the_windowed_group(make_scheduler, make_request, finish_all):
    s = make_scheduler(groups=[FULL, GroupSize(5, 6)], max_num_batched_tokens=8)
    run_one(s, make_request(PROMPT, max_tokens=1), finish_all)
    # All pages are full or cached; the windowed pool holds four, of which the last window took three.
    assert (s.groups[0].pool.num_cached, s.groups[1].pool.num_cached) == (10, 3)
    assert run_one(s, make_request(PROMPT, max_tokens=1), finish_all) == 40
    # Pages 6 and 7, which position 32 sees, are gone: no shorter beginning is of use.
    assert run_one(s, make_request([*PROMPT][:34], max_tokens=1), finish_all) == 0


def test_the_longest_beginning_that_all_groups_still_have(make_scheduler, make_request, finish_all):
    s = make_scheduler(groups=[FULL, GroupSize(65, 6), GroupSize(65, 14)])
    run_one(s, make_request(PROMPT, max_tokens=1), finish_all)
    keys = [root_key("")]
    for start in range(0, 40, 4):
        keys.append(page_key(keys[-1], [*PROMPT][start : start + 4]))

    def lose(place, index):
        cache = s.groups[place].cache
        page = cache.find(keys[index + 1])
        cache._pool.forget(page)
        cache._evicted(page)

    def found():
        entry = Entry(make_request(PROMPT), (0, 0), limit=43)
        s.running.sharing.find(entry, 42)
        return entry.num_found

    assert found() == 10
    lose(1, 3)
    assert found() == 10, "it lies before the window"
    lose(2, 8)
    assert found() == 8, "what comes after page 9 sees page 8, what comes after page 7 sees 4 to 7"
    lose(1, 7)
    assert found() == 7
    lose(0, 5)
    assert found() == 3, "of the pages before 5 that the full group has, the short window lacks 3"


def test_the_last_windows_of_ended_sequences_outlast_what_windows_leave_behind(
    make_scheduler, make_request, finish_all
):
    s = make_scheduler(groups=[GroupSize(200), GroupSize(12, 6)])
    run_one(s, make_request(PROMPT, max_tokens=1), finish_all)
    run_one(s, make_request(20, max_tokens=40), finish_all)  # leaves more pages behind than the pool has
    assert run_one(s, make_request([*PROMPT, 50], max_tokens=1), finish_all) == 40


@pytest.mark.parametrize("groups", [[GroupSize(400), GroupSize(12, 6)], [GroupSize(12, 6)]])
def test_a_prompt_is_found_again_though_its_window_has_moved_on(
    make_scheduler, make_request, finish_all, groups
):
    s = make_scheduler(groups=groups)
    run_one(s, make_request([*PROMPT][:22], max_tokens=40), finish_all)
    run_one(s, make_request(4, max_tokens=50), finish_all)
    assert run_one(s, make_request([*PROMPT][:22], max_tokens=1), finish_all) == 20


def test_where_sequences_part_the_window_is_kept_from_the_second_one_on(
    make_scheduler, make_request, finish_all
):
    s = make_scheduler(groups=[GroupSize(400), GroupSize(12, 6)])
    found = []
    for user in range(5):
        found.append(
            run_one(s, make_request([*range(20), *range(900 + 20 * user, 915 + 20 * user)]), finish_all)
        )
        run_one(s, make_request(20, max_tokens=40), finish_all)
    assert found == [0, 8, 20, 20, 20]


def test_forks_share_the_window(make_scheduler, make_request, step):
    s = make_scheduler(groups=[FULL, WINDOW])
    leader = make_request(PROMPT, request_id="g")
    for request in (leader, *(make_request(PROMPT, request_id="g", index=i, leader=leader) for i in (1, 2))):
        s.add(request)
    for _ in range(4):
        batch = step(s)
    assert [(row.request.index, row.start, row.count) for row in batch.rows] == [
        (0, 42, 1),
        (1, 40, 2),
        (2, 40, 2),
    ]
    # Pages 8 and 9 are shared, and each has a page 10 of its own.
    assert s.groups[1].pool.num_used == 2 + 3


def test_a_windowed_pool_bounds_how_many_run_and_preempts(make_scheduler, make_request, step, finish_all):
    s = make_scheduler(groups=[FULL, GroupSize(8, 6)], max_num_batched_tokens=8, max_num_seqs=4)
    requests = [make_request(3, max_tokens=30) for _ in range(4)]
    for request in requests:
        s.add(request)
    finish_all(s)
    assert all(len(request.output_token_ids) == 30 for request in requests)
    assert s.groups[0].pool.num_total > 4 * 9, "the full group alone would have let all of them run"
    s2 = make_scheduler(groups=[FULL, GroupSize(14, 6)], max_num_batched_tokens=8, max_num_seqs=4)
    for _ in range(4):
        s2.add(make_request(3, max_tokens=30))
    for _ in range(2):
        step(s2)
    assert s2.num_running == 4, "windows of three pages each fit"
    finish_all(s2)
    assert s2.preemptions == 0


@pytest.mark.parametrize(("windowed", "most"), [(GroupSize(5, 6), 37), (GroupSize(4, 6), 12 + 1)])
def test_what_can_never_run_is_refused(make_scheduler, make_request, finish_all, windowed, most):
    """A window with room for itself and a chunk takes any length; one without holds what it holds."""
    s = make_scheduler(groups=[GroupSize(10), windowed], max_num_batched_tokens=8)
    assert s.capacity_tokens == most
    request = make_request(5, max_tokens=most - 5)
    s.add(request)
    finish_all(s)
    assert request.num_known_tokens == most
    with pytest.raises(RequestError, match="need more KV pages than exist"):
        s.add(make_request(5, max_tokens=most - 4))


def test_waste_and_usage_count_every_group_by_its_layers(make_scheduler, make_request, step):
    s = make_scheduler(groups=[FULL, WINDOW], max_num_batched_tokens=64)
    s.add(make_request(42))
    step(s)
    # The chunk took 11 pages in both groups; two token places are unused.
    assert (s.allocated_tokens, s.used_tokens) == (6 * 44, 6 * 42)
    step(s)
    # Position 42 sees 37 and later: two of the windowed group's pages.
    assert (s.allocated_tokens, s.used_tokens) == (6 * 44 + 44 + 5 * 8, 6 * 42 + 43 + 5 * 7)
    assert s.kv_usage == 11 / 64


def test_after_a_reset_no_group_offers_anything(make_scheduler, make_request, finish_all):
    s = make_scheduler(groups=[FULL, WINDOW])
    run_one(s, make_request(PROMPT), finish_all)
    s.reset_prefix_cache()
    assert [len(group.cache) for group in s.groups] == [0, 0]
    assert run_one(s, make_request(PROMPT), finish_all) == 0
