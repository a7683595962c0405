"""What a step takes: decodes first, then prompt chunks, then newcomers, inside the budget; and what ends a request."""

import pytest

from jinfer.errors import ConfigError, QueueFullError, RequestError
from jinfer.request import FinishReason, RequestState
from jinfer.sampling.params import SamplingParams


def spans(batch):
    return [(row.request.request_id, row.start, row.count) for row in batch.rows]


def test_a_prompt_is_cut_to_the_budget_and_only_its_last_chunk_samples(make_scheduler, make_request, step):
    s = make_scheduler()
    s.add(make_request(37))
    batches = [step(s) for _ in range(4)]
    assert [spans(b) for b in batches] == [
        [("r1", 0, 16)],
        [("r1", 16, 16)],
        [("r1", 32, 5)],
        [("r1", 37, 1)],
    ]
    assert [b.rows[0].samples for b in batches] == [False, False, True, True]
    assert [b.rows[0].from_slot for b in batches] == [False, False, False, True]
    assert [b.decode_only for b in batches] == [False, False, False, True]


def test_decodes_go_first_and_prompts_fill_the_rest_of_the_budget(make_scheduler, make_request, step):
    s = make_scheduler()
    s.add(make_request(3))
    s.add(make_request(20))
    assert spans(step(s)) == [("r1", 0, 3), ("r2", 0, 13)]
    s.add(make_request(30))
    batch = step(s)
    assert spans(batch) == [("r1", 3, 1), ("r2", 13, 7), ("r3", 0, 8)]
    assert (batch.num_decode_rows, batch.num_tokens) == (1, 16)
    assert [r.request_id for r in batch.admitted] == ["r3"]


def test_a_chunk_of_one_token_is_not_a_decode_row(make_scheduler, make_request, step):
    s = make_scheduler()
    s.add(make_request(17))
    step(s)
    batch = step(s)
    assert spans(batch) == [("r1", 16, 1)]
    assert (batch.rows[0].from_slot, batch.rows[0].samples, batch.num_decode_rows) == (False, True, 0)


def test_newcomers_wait_for_slots(make_scheduler, make_request, step):
    s = make_scheduler(max_num_seqs=2)
    requests = [make_request(2, max_tokens=2) for _ in range(3)]
    for request in requests:
        s.add(request)
    assert [row.slot for row in step(s).rows] == [0, 1]
    assert (s.num_running, s.num_waiting, requests[2].slot) == (2, 1, -1)
    step(s)
    assert [r.state for r in requests] == [RequestState.FINISHED] * 2 + [RequestState.WAITING]
    assert [(row.request, row.slot) for row in step(s).rows] == [(requests[2], 0)]


def test_pages_are_told_where_they_go(make_scheduler, make_request, step):
    s = make_scheduler()
    s.add(make_request(18))
    table = []
    for batch in [step(s) for _ in range(6)]:
        row = batch.rows[0]
        assert row.new_page_start == len(table)
        table += row.new_pages[0] if row.new_pages else []
        assert len(table) == -(-(row.start + row.count) // 4)
    assert len(set(table)) == len(table) == 6
    assert 0 not in table


def test_a_request_ends_at_max_tokens_and_returns_everything(make_scheduler, make_request, finish_all):
    s = make_scheduler()
    request = make_request(5, max_tokens=3)
    s.add(request)
    assert len(finish_all(s)) == 3
    assert (request.output_token_ids, request.finish_reason) == ([7, 7, 7], FinishReason.LENGTH)
    assert (s.kv_usage, s.num_running, request.slot) == (0, 0, -1)
    t = request.timings()
    assert t.scheduled is not None
    assert t.first_token is not None
    assert t.finished is not None
    assert t.arrival <= t.scheduled <= t.first_token <= t.finished


@pytest.mark.parametrize(("total", "asked"), [(0, None), (20, None), (20, 40)])
def test_a_request_ends_at_the_models_or_its_own_length(
    make_scheduler, make_request, finish_all, total, asked
):
    s = make_scheduler(max_model_len=32)
    request = make_request(5, max_tokens=asked, max_total_tokens=total)
    s.add(request)
    finish_all(s)
    assert request.num_known_tokens == (total or 32)
    assert request.finish_reason is FinishReason.LENGTH


def test_as_many_tokens_as_fit_means_as_many_as_the_pages_hold(make_scheduler, make_request, finish_all):
    s = make_scheduler(num_pages=4, max_model_len=1000)
    request = make_request(5, max_tokens=None)
    s.add(request)
    finish_all(s)
    assert request.num_known_tokens == s.capacity_tokens == 3 * 4 + 1


def test_an_end_token_ends_a_request_and_a_stop_token_is_its_reason(make_scheduler, make_request, step):
    s = make_scheduler()
    ends = frozenset({7, 8})
    params = SamplingParams(stop_token_ids=(8,))
    eos, stop = (make_request(params=params, end_token_ids=ends) for _ in range(2))
    s.add(eos)
    s.add(stop)
    batch = s.schedule()
    s.commit(batch, [7, 8])
    assert (eos.finish_reason, eos.stop_reason, eos.output_token_ids) == (FinishReason.STOP, None, [7])
    assert (stop.finish_reason, stop.stop_reason, stop.output_token_ids) == (FinishReason.STOP, 8, [8])


def test_an_end_token_counts_as_stop_even_as_the_last_token(make_scheduler, make_request, step):
    s = make_scheduler()
    request = make_request(max_tokens=1, end_token_ids=frozenset({7}))
    s.add(request)
    step(s)
    assert request.finish_reason is FinishReason.STOP


def test_nothing_to_do_is_no_step(make_scheduler, make_request, step):
    s = make_scheduler()
    assert s.schedule() is None
    s.add(make_request(max_tokens=1))
    assert step(s).step_id == 0
    assert s.schedule() is None
    assert not s.has_unfinished


# ---- overlap


def test_a_step_is_planned_before_the_last_ones_tokens_are_known(make_scheduler, make_request):
    s = make_scheduler()
    request = make_request(4, max_tokens=3)
    s.add(request)
    first, second, third = s.schedule(), s.schedule(), s.schedule()
    assert [spans(b) for b in (first, second, third)] == [[("r1", 0, 4)], [("r1", 4, 1)], [("r1", 5, 1)]]
    assert request.num_in_flight == 3
    assert s.schedule() is None, "its third and last token is in flight"
    for batch, token in ((first, 11), (second, 12), (third, 13)):
        assert s.commit(batch, [token]) == [(batch.rows[0], token)]
    assert (request.output_token_ids, request.finish_reason) == ([11, 12, 13], FinishReason.LENGTH)
    assert request.num_in_flight == 0


def test_the_token_behind_an_end_token_is_dropped(make_scheduler, make_request):
    s = make_scheduler()
    request, newcomer = make_request(end_token_ids=frozenset({9})), make_request()
    s.add(request)
    first, in_vain = s.schedule(), s.schedule()
    s.commit(first, [9])
    assert request.finished
    assert s.kv_usage == 0, "its pages are free although a step still runs with them"
    s.add(newcomer)
    third = s.schedule()
    assert third.rows[0].slot == in_vain.rows[0].slot
    assert s.commit(in_vain, [5]) == []
    assert (request.output_token_ids, newcomer.output_token_ids) == ([9], [])
    s.commit(third, [6])
    assert newcomer.output_token_ids == [6]


def test_steps_are_committed_in_order_with_a_token_per_row(make_scheduler, make_request):
    s = make_scheduler()
    s.add(make_request())
    first, second = s.schedule(), s.schedule()
    with pytest.raises(ValueError, match="one token per row"):
        s.commit(first, [])
    s.commit(second, [1])
    with pytest.raises(ValueError, match="steps in order"):
        s.commit(first, [1])


# ---- what is refused


@pytest.mark.parametrize(
    ("prompt", "asked", "message", "param"),
    [
        (0, 1, "prompt is empty", "prompt"),
        (64, 1, "prompt has 64 tokens and the limit .* is 64", "prompt"),
        (40, 1, "prompt has 40 tokens and the KV pages hold 36", "prompt"),
        (20, 30, "20 prompt tokens and 30 output tokens need more KV pages than exist", "max_tokens"),
    ],
)
def test_a_request_that_can_never_run_is_refused(make_scheduler, make_request, prompt, asked, message, param):
    s = make_scheduler(num_pages=10)
    with pytest.raises(RequestError, match=message) as error:
        s.add(make_request(prompt, max_tokens=asked))
    assert error.value.param == param
    assert not s.has_unfinished
    s.check_integrity()


def test_the_largest_request_that_fits_runs(make_scheduler, make_request, finish_all):
    s = make_scheduler(num_pages=10)
    request = make_request(20, max_tokens=17)
    s.add(request)
    finish_all(s)
    assert (request.num_known_tokens, request.num_preemptions) == (37, 0)


def test_a_full_queue_refuses(make_scheduler, make_request, step):
    s = make_scheduler(max_num_waiting=2, max_num_seqs=1)
    s.add(make_request())
    s.add(make_request())
    with pytest.raises(QueueFullError, match="2 requests are waiting, max_num_waiting is 2"):
        s.add(make_request())
    step(s)
    s.add(make_request())
    assert (s.num_running, s.num_waiting) == (1, 2)


def test_a_request_is_added_once(make_scheduler, make_request, step):
    s = make_scheduler()
    request = make_request(max_tokens=1)
    s.add(request)
    with pytest.raises(RequestError, match="added before"):
        s.add(request)
    step(s)
    with pytest.raises(RequestError, match="added before"):
        s.add(request)


def test_settings_that_contradict_each_other_are_refused(make_scheduler):
    with pytest.raises(ConfigError, match="less than max_num_seqs"):
        make_scheduler(max_num_seqs=32, max_num_batched_tokens=31)
    with pytest.raises(ConfigError, match="'lifo', expected one of fcfs, priority"):
        make_scheduler(policy="lifo")


# ---- ends from outside


def test_an_abort_returns_everything_wherever_the_request_is(make_scheduler, make_request, step):
    s = make_scheduler(max_num_seqs=2)
    running, prefilling, queued = make_request(4), make_request(30), make_request(4)
    for request in (running, prefilling, queued):
        s.add(request)
    step(s)
    for request in (queued, prefilling, running):
        assert s.abort(request.request_id) == [request]
        assert (request.state, request.finish_reason) == (RequestState.FINISHED, FinishReason.ABORT)
        assert request.slot == -1
        s.check_integrity()
    assert (s.kv_usage, s.num_running, s.num_waiting, s.has_unfinished) == (0, 0, 0, False)
    assert s.abort("unknown") == s.abort(running.request_id) == []


def test_a_stop_string_in_the_last_tokens_text_wins_over_length(make_scheduler, make_request, step):
    s = make_scheduler()
    request, other = make_request(max_tokens=1), make_request(end_token_ids=frozenset({7}))
    s.add(request)
    s.add(other)
    step(s)
    s.finish(request, FinishReason.STOP, "###")
    assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, "###")
    s.finish(other, FinishReason.ERROR)
    assert other.finish_reason is FinishReason.STOP


def test_finish_ends_a_running_request_with_its_reason(make_scheduler, make_request, step):
    s = make_scheduler()
    request = make_request()
    s.add(request)
    step(s)
    s.finish(request, FinishReason.STOP, "###")
    assert (request.finish_reason, request.stop_reason, s.kv_usage) == (FinishReason.STOP, "###", 0)
