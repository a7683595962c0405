"""Out of pages, and who goes first: priorities, preemption, and that nothing starves."""

from jinfer.request import RequestState
from jinfer.schedule.entry import Entry
from jinfer.schedule.policy import WaitingQueue, order_of


def test_the_newest_is_preempted_and_computed_again(make_scheduler, make_request, step, finish_all):
    s = make_scheduler(num_pages=7)
    old, new = make_request(8, max_tokens=13), make_request(8, max_tokens=13)
    s.add(old)
    s.add(new)
    while not s.preemptions:
        batch = step(s)
    assert (old.state, new.state) == (RequestState.RUNNING, RequestState.WAITING)
    assert [row.request for row in batch.rows] == [old]
    assert (new.num_computed, new.slot, new.num_preemptions) == (0, -1, 1)
    assert len(new.output_token_ids) == 5, "what it had sampled is not lost"
    batches = finish_all(s)
    again = [row for batch in batches for row in batch.rows if row.request is new]
    # Its first pages were still cached; the rest, output included, is one known chunk.
    assert not again[0].from_slot
    assert again[0].start + again[0].count == 13
    assert len(old.output_token_ids) == len(new.output_token_ids) == 13
    assert old.num_preemptions == 0


def preempt_in_flight(make_scheduler, make_request):
    """Two requests and their first two steps, not committed: old has grown into the last page, so new, whose first
    token is in flight, was preempted."""
    s = make_scheduler(num_pages=5, max_num_seqs=2)
    old, new = make_request(8, max_tokens=2), make_request(4, max_tokens=10, end_token_ids=frozenset({9}))
    s.add(old)
    s.add(new)
    first, second = s.schedule(), s.schedule()
    assert [[row.request for row in batch.rows] for batch in (first, second)] == [[old, new], [old]]
    assert (new.state, new.num_in_flight) == (RequestState.WAITING, 1)
    return s, old, new, first, second


def test_a_preempted_request_waits_until_its_token_in_flight_is_known(make_scheduler, make_request, step):
    s, old, new, first, second = preempt_in_flight(make_scheduler, make_request)
    assert s.schedule() is None, "there are a slot and a page, but not all its tokens are known"
    assert s.commit(first, [1, 2]) == [(first.rows[0], 1), (first.rows[1], 2)]
    s.commit(second, [3])
    assert (old.output_token_ids, old.finished) == ([1, 3], True)
    row = step(s).rows[0]
    assert (row.request, row.start + row.count, row.from_slot) == (new, 5, False)
    assert new.output_token_ids == [2, 7]


def test_the_token_in_flight_of_a_preempted_request_may_end_it(make_scheduler, make_request):
    s, _, new, first, second = preempt_in_flight(make_scheduler, make_request)
    s.commit(first, [1, 9])
    assert (new.finished, new.output_token_ids, s.num_waiting) == (True, [9], 0)
    s.commit(second, [3])
    assert not s.has_unfinished
    s.check_integrity()


def test_a_newcomer_is_not_admitted_where_the_others_would_push_it_out(make_scheduler, make_request, step):
    s = make_scheduler(num_pages=5)
    old, new = make_request(8, max_tokens=8), make_request(8, max_tokens=8)
    s.add(old)
    s.add(new)
    step(s)
    assert (s.num_running, s.num_waiting) == (1, 1), "two pages are left, but old will take one of them"


def test_a_large_request_at_the_head_is_not_overtaken(make_scheduler, make_request, step, finish_all):
    s = make_scheduler(num_pages=9, max_num_seqs=3)
    first, large, small = make_request(12, 9), make_request(28, 4), make_request(1, 1)
    s.add(first)
    s.add(large)
    s.add(small)
    while not large.num_computed:
        assert small.state is RequestState.WAITING
        step(s)
    assert first.finished
    finish_all(s)
    assert large.num_preemptions == small.num_preemptions == 0


def test_priority_decides_who_is_admitted_and_arrival_between_equals(make_scheduler, make_request, step):
    s = make_scheduler(policy="priority", max_num_seqs=1)
    for priority in (1, 0, 1, 0):
        s.add(make_request(2, max_tokens=1, priority=priority))
    order = [step(s).rows[0].request.request_id for _ in range(4)]
    assert order == ["r2", "r4", "r1", "r3"]


def test_fcfs_ignores_priority(make_scheduler, make_request, step):
    s = make_scheduler(policy="fcfs", max_num_seqs=1)
    for priority in (1, 0):
        s.add(make_request(2, max_tokens=1, priority=priority))
    assert [step(s).rows[0].request.request_id for _ in range(2)] == ["r1", "r2"]


def test_the_least_urgent_is_preempted_first(make_scheduler, make_request, step):
    s = make_scheduler(num_pages=7, policy="priority")
    casual, urgent = make_request(8, 13, priority=5), make_request(8, 13, priority=1)
    s.add(casual)
    s.add(urgent)
    while not s.preemptions:
        step(s)
    assert (urgent.num_preemptions, casual.num_preemptions) == (0, 1)


def test_a_prompt_that_is_being_computed_can_be_preempted(make_scheduler, make_request, step, finish_all):
    s = make_scheduler(num_pages=12, max_num_seqs=2, max_num_batched_tokens=2)
    old, new = make_request(2, max_tokens=30), make_request(28, max_tokens=2)
    s.add(old)
    step(s)
    s.add(new)
    while not s.preemptions:
        step(s)
    assert (new.num_preemptions, new.output_token_ids) == (1, [])
    finish_all(s)
    assert len(new.output_token_ids) == 2


def test_every_one_of_many_ends_in_a_tiny_pool(make_scheduler, make_request, finish_all):
    s = make_scheduler(num_pages=8, max_num_seqs=4, page_size=2, max_num_batched_tokens=5)
    requests = [make_request(1 + i % 5, max_tokens=3 + i % 7) for i in range(30)]
    for request in requests:
        s.add(request)
    finish_all(s)
    assert [len(r.output_token_ids) for r in requests] == [3 + i % 7 for i in range(30)]
    assert s.preemptions > 0
    assert s.kv_usage == 0


# ---- the queue


def queued(make_request, priorities, policy="priority"):
    queue, entries = WaitingQueue(), []
    for arrival, priority in enumerate(priorities):
        request = make_request(priority=priority)
        entries.append(Entry(request, order_of(request, arrival, policy), limit=9))
        queue.push(entries[-1])
    return queue, entries


def test_the_queue_is_in_order_and_a_returned_entry_is_ahead_of_later_ones(make_request):
    queue, entries = queued(make_request, [0, 1, 0])
    assert queue.entries() == [entries[0], entries[2], entries[1]]
    queue.remove(entries[0])
    assert queue.head() is entries[2]
    queue.push(entries[0])
    assert (queue.head(), len(queue)) == (entries[0], 3)


def test_removed_entries_do_not_pile_up(make_request):
    queue, entries = queued(make_request, range(1000))
    for entry in entries[:0:-1]:
        queue.remove(entry)
    assert (len(queue), queue.head()) == (1, entries[0])
    assert len(queue._heap) < 100
    queue.remove(entries[0])
    assert (len(queue), queue.head()) == (0, None)
