"""The scheduler against a device that is simulated and a model that is naive.

The device runs the steps in their order: it keeps what a runner keeps on device (a page table and a last token per
slot) and an array of pages. What it writes for a token is a hash of all tokens before it, read through the page table:
what real KV is a function of. The next token is a hash of that. So a page given away too early, shared wrongly, or
named wrongly changes a context; and each request's output must be what its prompt alone determines, whatever the plan.

Layers form page groups, some with a window: the device reads in each group the keys that its layers see, and no others.
"""

from zlib import crc32

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jinfer.cache.groups import GroupSize
from jinfer.errors import QueueFullError, RequestError
from jinfer.request import FinishReason, Request, RequestState
from jinfer.sampling.params import SamplingParams
from jinfer.schedule.scheduler import Scheduler

VOCABULARY = 12
END = 0


def digest(*numbers):
    return hash(numbers)  # of a tuple of ints it is the same in every process, unlike a string's


def next_token(kv, index):
    return digest(kv, index, -1) % VOCABULARY


class Naive:
    """What one request must read and write, kept as plain lists that nobody shares."""

    def __init__(self, request, root):
        self.request = request
        self.root = root  # of the hash chain: requests that must not share pages differ in it
        self.tokens = list(request.prompt_token_ids)  # those in flight included
        self.kv = []  # of its present life, as far as dispatched
        self.prompt_is_computed = False  # by some step, in whatever life
        self.decodes = False  # its newest token was sampled in its present life, so it is in its slot
        self.decoded = False  # the last step gave it a decode row
        self.version = 0  # of the weights its last step ran with
        self.saw_update = False  # ran while the weights changed: its output is a mixture
        self.was_cut = False  # ended from outside

    def chain(self, start, stop, version):
        kv = self.kv[start - 1] if start else self.root
        values = []
        for token in self.tokens[start:stop]:
            kv = digest(kv, token, version)
            values.append(kv)
        return values

    def expected_output(self, version, limit):
        """Token by token, with no scheduler at all."""
        kv, output = self.root, []
        for token in self.request.prompt_token_ids:
            kv = digest(kv, token, version)
        while True:
            token = next_token(kv, self.request.index)
            output.append(token)
            if token in self.request.end_token_ids:
                return output, FinishReason.STOP
            if len(self.request.prompt_token_ids) + len(output) == limit:
                return output, FinishReason.LENGTH
            kv = digest(kv, token, version)


class Device:
    """Pages and page tables per group, and last tokens, as a runner has them. Stale contents are never cleared."""

    def __init__(self, sizes, page_size, num_slots):
        self.page_size = page_size
        self.windows = [size.window for size in sizes]
        self.pages = [[[0] * page_size for _ in range(size.num_pages)] for size in sizes]
        self.tables = [[[] for _ in range(num_slots)] for _ in sizes]
        self.last_token = [-1] * num_slots
        self.version = 0

    def update_tables(self, row, is_new):
        """Takes the row's new pages, and returns its tables, which all end with the page of its last token."""
        count = -(-(row.start + row.count) // self.page_size) - row.new_page_start
        if not row.new_pages:
            assert count == 0, "a page too few"
        for tables, pages in zip(self.tables, row.new_pages or [[]] * len(self.windows), strict=True):
            assert len(pages) == count, "a page too few or too many"
            table = tables[row.slot]
            if is_new:  # what its last owner left before this lies there still, and must not be read
                table[:] = [-1] * row.new_page_start
            table[row.new_page_start :] = pages
        return [tables[row.slot] for tables in self.tables]

    def read(self, group, table, row):
        """What the row's first token sees in a group, itself not included."""
        window = self.windows[group]
        first = 0 if window is None else max(0, row.start - window + 1)
        places = [(table[p // self.page_size], p % self.page_size) for p in range(first, row.start)]
        assert all(page > 0 for page, _ in places), "a page that is still seen was given back"
        return [self.pages[group][page][offset] for page, offset in places], first

    def run(self, batch, naives):
        """One step. Rows read what earlier steps wrote and what they write themselves, in any order."""
        writes, sampled = {}, []
        for row in batch.rows:
            naive = naives[row.request]
            is_new = row.request in batch.admitted
            if is_new:
                naive.kv = naive.chain(0, row.start, self.version)
                naive.decodes = False
            else:
                assert row.new_page_start * self.page_size >= row.start, "a page that is written changes"
            end = row.start + row.count
            tables = self.update_tables(row, is_new)
            for group, table in enumerate(tables):
                seen, first = self.read(group, table, row)
                assert seen == naive.kv[first : row.start], "the context is not the request's own"
            if row.from_slot:
                assert naive.decodes
                assert row.count == 1
                assert self.last_token[row.slot] == naive.tokens[row.start]
            else:
                chunk = row.request.token_slice(row.start, end)
                assert chunk == naive.tokens[row.start : end]
                assert len(chunk) == row.count
            naive.decoded = row.from_slot
            naive.version = self.version
            naive.prompt_is_computed |= end >= row.request.num_prompt_tokens
            values = naive.chain(row.start, end, self.version)
            naive.kv = naive.kv[: row.start] + values
            for group, table in enumerate(tables):
                for position, value in enumerate(values, row.start):
                    place = (group, table[position // self.page_size], position % self.page_size)
                    assert place not in writes, "two rows write the same place"
                    assert place[1] > 0
                    writes[place] = value
            token = -1  # a row that samples nothing returns anything
            if row.samples:
                assert end == len(naive.tokens)
                naive.decodes = True
                token = self.last_token[row.slot] = next_token(values[-1], row.request.index)
                naive.tokens.append(token)
            sampled.append(token)
        for (group, page, offset), value in writes.items():
            self.pages[group][page][offset] = value
        return sampled


# Which page groups there are: None sees everything, a number is a window.
FULL, SHORT, LONG = st.none(), st.integers(1, 5), st.integers(6, 40)
KINDS = [[FULL], [FULL, SHORT], [FULL, LONG], [SHORT], [FULL, SHORT, LONG], [SHORT, LONG]]


prompts = st.builds(
    lambda stem, length, tail: ([1, 2, 3, 4, 5, 6, 7, 8] * 3)[stem : stem + length] + tail,
    st.sampled_from([0, 0, 0, 1]),  # few beginnings, so that requests find each other's pages
    st.sampled_from([0, 3, 6, 9, 12, 14]),
    st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=3),
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        kinds=st.sampled_from(KINDS).flatmap(
            lambda kinds: st.tuples(*(st.tuples(kind, st.integers(8, 60)) for kind in kinds))
        ),
        page_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(0, 9),
        policy=st.sampled_from(["fcfs", "priority"]),
        caching=st.sampled_from([True, True, False]),
        depth=st.sampled_from([1, 2, 2, 3]),
        share=st.sampled_from([None, None, 1, 2]),
    )
    def start(self, kinds, page_size, max_num_seqs, budget, policy, caching, depth, share):
        self.caching, self.policy, self.depth = caching, policy, depth
        self.budget = max_num_seqs + budget
        self.share = share
        self.model_len = 30
        self.page_size = page_size
        sizes = [GroupSize(1 + -(-tokens // page_size), window) for window, tokens in kinds]
        self.scheduler = Scheduler(
            groups=sizes,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_model_len=self.model_len,
            max_num_waiting=8,
            enable_prefix_caching=caching,
            policy=policy,
            max_seqs_per_group=share,
        )
        self.device = Device(sizes, page_size, max_num_seqs)
        # A window needs the pages of one chunk and of what its first token sees, wherever these begin.
        rooms = [
            (size.num_pages - 1) * page_size + 1
            for size in sizes
            if size.window is None or self.most_pages(size.window, self.budget) > size.num_pages - 1
        ]
        self.room = min(rooms, default=self.model_len)
        self.naives = {}
        self.in_flight = []
        self.groups = 0
        self.is_sound = True

    # ---- rules

    @rule(
        prompt=prompts,
        max_tokens=st.one_of(st.integers(1, 12), st.none()),
        salt=st.sampled_from(["", "", "", "tenant"]),
        cacheable=st.sampled_from([True, True, True, False]),
        priority=st.integers(0, 2),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        ends=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        group=st.sampled_from(["", "", "a group"]),
    )
    def add(self, prompt, max_tokens, salt, cacheable, priority, n, ends, prompt_logprobs, group):
        self.groups += 1
        group_id = f"r{self.groups}"
        if not self.caching:  # as the engine does it
            cacheable, salt = n > 1, group_id
        leader = None
        for index in range(n):
            request = Request(
                group_id,
                tuple(prompt),
                SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs),
                priority=priority,
                cache_salt=salt,
                cacheable=cacheable,
                group=group,
                index=index,
                leader=leader,
                end_token_ids=frozenset({END}) if ends else frozenset(),
            )
            fits = len(prompt) < min(self.model_len, self.room) and (
                max_tokens is None or min(self.model_len, len(prompt) + max_tokens) <= self.room
            )
            waiting = self.scheduler.num_waiting
            try:
                self.scheduler.add(request)
            except QueueFullError:
                assert fits
                assert waiting >= 8
                return
            except RequestError:
                assert not fits
                return
            assert fits
            assert waiting < 8
            leader = leader or request
            root = crc32(salt.encode()) if cacheable else digest(self.groups, index, -2)
            self.naives[request] = Naive(request, root)

    @precondition(lambda self: len(self.in_flight) < self.depth)
    @rule()
    def dispatch(self):
        self.schedule_and_check()

    @precondition(lambda self: self.in_flight)
    @rule()
    def commit(self):
        batch, sampled = self.in_flight.pop(0)
        alive = [not row.request.finished for row in batch.rows]
        appended = self.scheduler.commit(batch, sampled)
        expected = [
            (row, token)
            for row, token, lives in zip(batch.rows, sampled, alive, strict=True)
            if row.samples and lives
        ]
        assert appended == expected
        for row, token in appended:
            naive = self.naives[row.request]
            known = len(row.request.prompt_token_ids) + len(row.request.output_token_ids)
            assert row.request.output_token_ids[-1] == token == naive.tokens[known - 1]

    @rule(steps=st.integers(1, 12))
    def run(self, steps):
        for _ in range(steps):
            if len(self.in_flight) < self.depth:
                self.schedule_and_check()
            if len(self.in_flight) == self.depth:
                self.commit()

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data(), kind=st.sampled_from(["abort", "finish", "update_weights"]))
    def interfere(self, data, kind):
        if kind == "update_weights":
            return self.update_weights()
        request = data.draw(st.sampled_from(self.unfinished()))
        if kind == "finish":
            self.scheduler.finish(request, FinishReason.STOP, "stop")
            assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, "stop")
            ended = [request]
        else:
            ended = [r for r in self.unfinished() if r.request_id == request.request_id]
            assert self.scheduler.abort(request.request_id) == ended
            assert all(r.finish_reason is FinishReason.ABORT for r in ended)
        for r in ended:
            self.naives[r].was_cut = True
        return None

    def update_weights(self):
        self.device.version += 1
        self.scheduler.reset_prefix_cache()
        for request in self.unfinished():
            if request.num_computed or request.output_token_ids or request.num_in_flight:
                self.naives[request].saw_update = True

    # ---- what must hold

    def most_pages(self, window, chunk):
        """Pages that `chunk` tokens and the window before them touch, by trying every place in a page."""
        size, span = self.page_size, window - 1 + chunk
        return max((at + span - 1) // size + 1 for at in range(size))

    def first_page(self, window, start):
        return 0 if window is None else max(0, start - window + 1) // self.page_size

    def unfinished(self):
        return [r for r in self.naives if not r.finished]

    def order(self, request):
        return (request.priority if self.policy == "priority" else 0, list(self.naives).index(request))

    def schedule_and_check(self):
        self.is_sound = False  # until the end: after a failure teardown would only report its consequences
        before = {r: (r.state, len(self.naives[r].tokens)) for r in self.unfinished()}
        running = [r for r, (state, _) in before.items() if state is RequestState.RUNNING]
        batch = self.scheduler.schedule()
        preempted = [r for r in running if r.state is RequestState.WAITING]
        for victim in preempted:
            others = [r for r in running if r.state is RequestState.RUNNING]
            assert all(self.order(r) < self.order(victim) for r in others), "not the newest was preempted"
        if batch is None:
            assert self.in_flight or not before, "nothing runs and nothing will"
            self.is_sound = True
            return
        rows = {row.request: row for row in batch.rows}
        assert len(rows) == len(batch.rows)
        assert len({row.slot for row in batch.rows}) == len(batch.rows)
        assert sum(row.count for row in batch.rows) == batch.num_tokens <= self.budget
        assert [row.from_slot for row in batch.rows] == [i < batch.num_decode_rows for i in range(len(rows))]
        assert batch.decode_only == all(row.from_slot for row in batch.rows)
        for request in running:
            tokens = before[request][1]
            is_open = self.naives[request].decodes and tokens < self.limit(request)
            if is_open and request not in preempted:
                assert rows[request].from_slot, "a decode was left out"
            if tokens == self.limit(request):
                assert request not in rows, "a row in vain whose end was certain"
        self.check_budget_and_admission(batch, before, preempted)
        sampled = self.device.run(batch, self.naives)
        self.in_flight.append((batch, sampled))
        self.is_sound = True

    def check_budget_and_admission(self, batch, before, preempted):
        chunks = [row for row in batch.rows if not row.from_slot]
        if any(not row.samples for row in chunks):
            assert batch.num_tokens == self.budget, "a chunk was cut though budget was left"
            assert sum(not row.samples for row in chunks) == 1, "the budget was not spent in order"
        assert not (preempted and batch.admitted)
        waiting = [
            r
            for r in before
            if r.state is RequestState.WAITING
            and (r.leader is None or r.num_preemptions)
            and not self.has_its_share(r)
        ]
        for request in batch.admitted:
            assert before[request][0] is RequestState.WAITING
            assert all(self.order(request) < self.order(r) for r in waiting), "the queue was jumped"
            row = next(row for row in batch.rows if row.request is request)
            assert row.start % self.scheduler.page_size == 0
            leader = request.leader
            alone = not self.caching or request.params.prompt_logprobs is not None
            if not request.cacheable or (leader is None and alone):
                assert row.start == 0, "pages found by a request that must not look"
            shares = request.cacheable and request.num_prompt_tokens > self.scheduler.page_size
            if leader is not None and shares and not leader.finished:
                assert self.naives[leader].prompt_is_computed, "a fork ran before its leader's prompt"

    def has_its_share(self, request):
        """Whether a request may have to wait for another of its group."""
        group = request.group or request.request_id
        others = [r for r in self.unfinished() if (r.group or r.request_id) == group and r is not request]
        return self.share is not None and not request.num_preemptions and len(others) >= self.share

    def limit(self, request):
        limit = min(self.model_len, self.room)
        asked = request.params.max_tokens
        return limit if asked is None else min(limit, request.num_prompt_tokens + asked)

    @invariant()
    def books_balance(self):
        if not hasattr(self, "scheduler"):
            return
        s = self.scheduler
        s.check_integrity()
        running = [r for r in self.naives if r.state is RequestState.RUNNING]
        assert s.num_running == len(running)
        assert s.num_waiting == len(self.unfinished()) - len(running)
        for group, tables in zip(s.groups, self.device.tables, strict=True):
            starts = [(tables[r.slot], r.num_computed) for r in running]
            needed = {
                page for table, start in starts for page in table[self.first_page(group.window, start) :]
            }
            assert len(needed) <= group.pool.num_used
            if group.window is None:
                assert group.pool.num_used == len(needed), "what ended has not returned everything"
            else:
                most = [
                    self.most_pages(group.window, 1 if self.naives[r].decoded else self.budget)
                    for r in running
                ]
                assert group.pool.num_used <= sum(most), "more is kept than the windows need"
        assert s.kv_usage == max(group.pool.num_used / group.pool.num_total for group in s.groups)
        assert 0 <= s.used_tokens <= s.allocated_tokens
        assert 0 <= s.prefix_hits <= s.prefix_queries

    def teardown(self):
        if not hasattr(self, "scheduler") or not self.is_sound:
            return
        # Preempted work is done again, but the first in line always advances: a bound on its steps bounds the run.
        steps = len(self.naives) * 2 * (self.model_len + 4)
        while self.unfinished() or self.in_flight:
            steps -= 1
            assert steps > 0, "no progress"
            if len(self.in_flight) < self.depth:
                self.schedule_and_check()
            if self.in_flight:
                self.commit()
            self.books_balance()
        assert not self.scheduler.has_unfinished
        assert self.scheduler.kv_usage == 0
        for request, naive in self.naives.items():
            assert request.finished
            assert request.num_in_flight == 0
            if naive.saw_update:
                continue
            output, reason = naive.expected_output(naive.version, self.limit(request))
            if naive.was_cut:
                assert output[: len(request.output_token_ids)] == request.output_token_ids
            else:
                assert (request.output_token_ids, request.finish_reason) == (output, reason)


SchedulerMachine.TestCase.settings = settings(
    max_examples=500,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
test_any_plan_gives_every_request_its_own_output = pytest.mark.timeout(300)(SchedulerMachine.TestCase)
