"""Continuous batching over paged KV: which tokens each step computes, and which pages they go to.

A step takes, inside one budget of tokens: first one token for every running sequence that decodes, then
chunks of the prompts that are running, then new requests while slots, pages and budget last. Same calls, same
plan.

Steps overlap: `schedule` may be called again before `commit` has told the last step's tokens. What it needs
to know is certain without them: a decode row's token is in its slot on the device, and where it goes depends
only on counts. Only an end token is a surprise: its request ends at `commit`, the row of the step already
dispatched runs in vain, and its token is dropped. The device runs steps in order, so pages can be given back
at once:

- A row writes only the positions [start, start + count) of its own sequence, start being the tokens computed
  before. So it never writes a page that is findable in the prefix cache: such a page is full, it lies in
  [0, start) of every sequence that has it, and later rows of these sequences write behind it.
- A row in vain was dispatched before its pages were given back. Their next owner's rows are dispatched later,
  so they run later, overwrite what was left there, and read only positions that they or the cache have
  written. The next owner makes a page findable when its own rows, which run after the one in vain, filled it.
- A page that an end token fills holds that token's KV if its row is dispatched: it becomes findable, rightly.
  The token sampled in vain behind it is never known, so no page with a place for it becomes findable.

- A page that lies before a sequence's window is given back when the row is planned whose tokens do not see it. The
  rows before that one, which may see it, run before it, and so before anything that its next owner writes.

A page becomes findable for the steps after the one that fills it, not for rows of the same step: within a
step an attention kernel may read and write pages in any order.

Nothing starves: the queue is kept by (class, arrival), its head blocks everything behind it, and the running
request that is first in that order is never preempted for another, so it ends, and so does the next. What a group has
beyond its share (`shares`) stays out of the queue until another of the group ends or a place is free that nobody else
wants. (Under `priority` a steady stream of urgent requests does hold back the others: that is what was asked for.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from jinfer.cache.groups import GroupSize, capacity_tokens
from jinfer.errors import ConfigError, QueueFullError, RequestError
from jinfer.request import FinishReason, Request, RequestState
from jinfer.schedule.batch import Batch, BatchRow
from jinfer.schedule.entry import Entry
from jinfer.schedule.integrity import check_scheduler
from jinfer.schedule.limits import token_limit
from jinfer.schedule.policy import WaitingQueue, check_policy, order_of
from jinfer.schedule.running import RunningSet
from jinfer.schedule.shares import Shares


class Scheduler:
    """Owns every request from `add` until its end, the slots [0, max_num_seqs) and every page group's pages.

    groups: one per kind of layers, see `jinfer.cache.groups`.

    The request's fields `state`, `slot`, `num_computed`, `num_in_flight`, `num_cached`, `num_preemptions`,
    `num_recomputed`, `cacheable` (only to False), `output_token_ids`, `finish_reason`, `stop_reason` and its
    times are written here and nowhere else.

    enable_prefix_caching=False: only forks (requests with a leader) look into the cache, to share the prompt
    pages of their leader; the caller gives leader and forks a `cache_salt` of their own, and cacheable=False to
    every other request.

    max_seqs_per_group: sequences that one group may have running beside smaller ones, see `shares`; None: all.

    recompute_beyond: a sequence that grows beyond so many tokens is computed anew, since the KV of all its tokens is
    then another, and shares no pages from then on.

    Counters: prefix_queries and prefix_hits (prompt tokens looked up and found, once per request), prompt_tokens and
    prompt_tokens_cached (those computed or found, and those found, once however many choices share them), preemptions,
    allocated_tokens and used_tokens (summed over steps and layers: room in the pages in use, and how much of it holds
    KV).
    """

    def __init__(
        self,
        *,
        groups: Sequence[GroupSize],
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_num_waiting: int,
        enable_prefix_caching: bool = True,
        policy: str = "fcfs",
        recompute_beyond: int | None = None,
        max_seqs_per_group: int | None = None,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {max_num_batched_tokens}, less than max_num_seqs "
                f"({max_num_seqs}): every running sequence needs a token a step, raise the one or lower the "
                "other"
            )
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_num_waiting = max_num_waiting
        self.policy = check_policy(policy)
        self.recompute_beyond = recompute_beyond
        self.running = RunningSet(
            groups,
            page_size,
            max_num_seqs,
            chunk=max_num_batched_tokens,
            only_forks_share=not enable_prefix_caching,
        )
        self.groups = self.running.groups
        # Tokens whose KV one sequence alone can have.
        pool_tokens = capacity_tokens(self.groups)
        self._pool_tokens = max_model_len if pool_tokens is None else pool_tokens

        self.entries: dict[Request, Entry] = {}  # every unfinished request
        self._by_id: dict[str, list[Entry]] = {}
        self.queue = WaitingQueue()
        self.shares = Shares(max_seqs_per_group or max_num_seqs + max_num_waiting)
        self._num_parked = 0
        self._arrivals = 0
        self._next_step = 0
        self._last_commit = -1

        # Requests that a fault in their own data ended when they were to be admitted; the caller takes them out.
        self.faults: list[tuple[Request, Exception]] = []

        self.prefix_queries = 0
        self.prefix_hits = 0
        self.prompt_tokens = 0
        self.prompt_tokens_cached = 0
        self.preemptions = 0
        self.allocated_tokens = 0
        self.used_tokens = 0

    # ---- what others may ask

    @property
    def has_unfinished(self) -> bool:
        return bool(self.entries)

    @property
    def num_running(self) -> int:
        return len(self.running.entries)

    @property
    def num_waiting(self) -> int:
        return len(self.queue) + self._num_parked + self.shares.num_held_back

    @property
    def kv_usage(self) -> float:
        """Share of the fullest group's pages that sequences use now; cached pages nobody uses count as free."""
        return max(group.pool.num_used / group.pool.num_total for group in self.groups)

    @property
    def capacity_tokens(self) -> int:
        """The most tokens, prompt and output, one request can have here (the last one's KV is not needed)."""
        return min(self.max_model_len, self._pool_tokens + 1)

    @property
    def capacity_prompt_only(self) -> int:
        """The same where the last one is not wanted, so that the prompt may fill the model's length."""
        return min(self.max_model_len + 1, self._pool_tokens + 1)

    def has(self, request_id: str) -> bool:
        """Whether an unfinished request has this id."""
        return request_id in self._by_id

    def parked(self) -> list[Entry]:
        """Forks that wait for their leaders' prompts."""
        return [fork for entry in self.entries.values() for fork in entry.forks]

    def check_integrity(self) -> None:
        """Raises IntegrityError if the books do not balance. Slow: for tests, and when the engine is idle."""
        check_scheduler(self)

    # ---- requests come and go

    def add(self, request: Request) -> None:
        """Queues a request. RequestError: it can never run here. QueueFullError: not now."""
        if request in self.entries or request.state is not RequestState.WAITING:
            raise RequestError(f"request {request.request_id!r} was added before: make a new Request")
        limit = token_limit(request, self.max_model_len, self._pool_tokens)
        if self.num_waiting >= self.max_num_waiting:
            raise QueueFullError(
                f"{self.num_waiting} requests are waiting, max_num_waiting is {self.max_num_waiting}: try "
                "again later"
            )
        entry = Entry(request, order_of(request, self._arrivals, self.policy), limit)
        self._arrivals += 1
        self.entries[request] = entry
        self._by_id.setdefault(request.request_id, []).append(entry)
        entry.share = self.shares.add(entry)
        leader = None if request.leader is None else self.entries.get(request.leader)
        # A fork whose leader has ended, or with no full page to share, has nothing to wait for.
        has_page = (request.num_prompt_tokens - 1) // self.page_size > 0
        if leader and request.cacheable and has_page and not self._prompt_is_computed(leader):
            entry.parked_behind = leader
            leader.forks.append(entry)
            self._num_parked += 1
        else:
            self._enqueue(entry)

    def _enqueue(self, entry: Entry) -> None:
        if self.shares.claim(entry):
            self.queue.push(entry)

    def abort(self, request_id: str) -> list[Request]:
        """Ends every request (all forks) of that id; slots and pages are free at once. Unknown id: []."""
        entries = self._by_id.get(request_id, [])
        # Forks first: ending their leader would only move them into the queue.
        ended = list(reversed(entries))
        for entry in ended:
            self._end(entry, FinishReason.ABORT, None)
        return [entry.request for entry in reversed(ended)]

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends one request from outside: stop string, timeout, error. On one that has ended already it does
        nothing, except that a stop string in the text of the last allowed token turns LENGTH into STOP."""
        entry = self.entries.get(request)
        if entry is not None:
            self._end(entry, reason, stop_reason)
        elif request.finish_reason is FinishReason.LENGTH and reason is FinishReason.STOP:
            request.finish_reason = reason
            request.stop_reason = stop_reason

    def fail(self, request: Request) -> None:
        """Ends a request whose KV is wrong or was never written, if it runs still: from now on nobody finds pages of
        its tokens."""
        entry = self.entries.get(request)
        if entry is not None:
            self._end(entry, FinishReason.ERROR, None)
        self.running.sharing.forget(request)

    def reset_prefix_cache(self) -> None:
        """Makes every cached page unfindable: the weights have changed, or a dispatched step has failed.

        What runs goes on with its pages. Their KV is partly of the old weights, so they are never offered to
        others; requests admitted from now on start anew.
        """
        self.running.reset_prefix_cache()

    # ---- one step

    def schedule(self) -> Batch | None:
        """The next step, or None if nothing can run before a commit or an `add`."""
        self._recompute_grown()
        preemptions = self.preemptions
        filled: list[Entry] = []  # entries whose pages this step fills
        rows = self._decode_rows(filled)
        num_decode_rows = len(rows)
        budget = self._prefill_running(rows, self.max_num_batched_tokens - num_decode_rows, filled)
        admitted: list[Request] = []
        # A step that had to take pages from someone has none for newcomers.
        if budget and self.preemptions == preemptions:
            budget = self._admit_waiting(rows, budget, filled, admitted)
        if not rows:
            return None
        for entry in filled:
            self.running.sharing.register(entry)
            if entry.forks and self._prompt_is_computed(entry):
                self._release_forks(entry)
        for group in self.groups:
            in_use = group.pool.num_used * self.page_size
            self.allocated_tokens += group.num_layers * in_use
            self.used_tokens += group.num_layers * (in_use - self.running.slack)
        step = self._next_step
        self._next_step += 1
        return Batch(step, rows, num_decode_rows, self.max_num_batched_tokens - budget, admitted)

    def _recompute_grown(self) -> None:
        """Sends back those whose next token is the first beyond `recompute_beyond`, to be computed anew."""
        if self.recompute_beyond is None:
            return
        for entry in list(self.running.entries):
            start = entry.request.num_computed
            if start == self.recompute_beyond and start >= entry.prefill_end and entry.to_sample:
                self._preempt(entry)

    def _decode_rows(self, filled: list[Entry]) -> list[BatchRow]:
        """One row for every running entry that decodes and may sample another token."""
        rows: list[BatchRow] = []
        running, page_size = self.running.entries, self.page_size
        index = 0
        # Not a for loop: making room removes entries from the end of `running`, those that have no row yet.
        while index < len(running):
            entry = running[index]
            request = entry.request
            start = request.num_computed
            # to_sample 0: its last token is in flight, so its end is certain.
            if start < entry.prefill_end or not entry.to_sample:
                index += 1
                continue
            num_pages = entry.page_end
            new_pages: Sequence[Sequence[int]] = ()
            if start >= entry.turn_at:
                self.running.slide(entry, start)
                if start == num_pages * page_size:
                    if not self._make_room(entry):
                        break  # it was the last of `running`, and is no longer in it
                    new_pages = self.running.grow(entry)
            rows.append(BatchRow(request, request.slot, start, 1, True, True, num_pages, new_pages))
            start += 1
            request.num_computed = start
            request.num_in_flight += 1
            entry.to_sample -= 1
            if start >= entry.register_at:
                filled.append(entry)
            index += 1
        self.running.slack -= len(rows)
        return rows

    def _prefill_running(self, rows: list[BatchRow], budget: int, filled: list[Entry]) -> int:
        """Adds chunks of the prompts that are being computed; returns the budget that is left. Their pages
        are reserved since admission, so they never have to make room."""
        for entry in self.running.entries:
            if not budget:
                break
            start = entry.request.num_computed
            if start < entry.prefill_end:
                budget -= self._chunk(entry, start, budget, entry.page_end, rows)
                filled.append(entry)
        return budget

    def _admit_waiting(
        self, rows: list[BatchRow], budget: int, filled: list[Entry], admitted: list[Request]
    ) -> int:
        """Admits from the head of the queue and adds their first chunks; returns the budget that is left. The
        head blocks those behind it, however small: otherwise a large request could wait forever."""
        while budget and self.running.free_slots:
            entry = self.queue.head() or self._beyond_its_share()
            # A preempted request waits until all its tokens are known, to be computed again.
            if entry is None or entry.request.num_in_flight:
                break
            request = entry.request
            if self.recompute_beyond is not None and request.num_known_tokens > self.recompute_beyond:
                # Cached pages of its beginning were computed for a shorter sequence.
                request.cacheable, request.num_recomputed = False, request.num_known_tokens
            try:
                if not self.running.admit(entry):
                    break
            except Exception as error:  # its look-up failed: nothing has changed
                self.faults.append((request, error))
                self._end(entry, FinishReason.ERROR, None)
                continue
            self.queue.remove(entry)
            self._note_admission(request)
            admitted.append(request)
            table_start = min(held.first for held in entry.held)
            budget -= self._chunk(entry, request.num_computed, budget, table_start, rows)
            filled.append(entry)
        return budget

    def _beyond_its_share(self) -> Entry | None:
        """An entry for a place that nobody else wants."""
        entry = self.shares.next_beyond()
        if entry is not None:
            self.queue.push(entry)
        return entry

    def _chunk(self, entry: Entry, start: int, budget: int, new_page_start: int, rows: list[BatchRow]) -> int:
        """Adds the row that computes the next known tokens of `entry`, as many as the budget allows."""
        request = entry.request
        count = min(budget, entry.prefill_end - start)
        end = start + count
        self.running.take_promised(entry, start, end)
        self.running.slack -= count
        if entry.num_prefilled < request.num_prompt_tokens and request.index == 0:
            processed = max(min(end, request.num_prompt_tokens), entry.num_prefilled)
            self.prompt_tokens += processed - entry.num_prefilled
            entry.num_prefilled = processed
        samples = end == entry.prefill_end
        new_pages: Sequence[Sequence[int]] = ()
        if new_page_start < entry.page_end:
            new_pages = [held.pages[new_page_start:] for held in entry.held]
        rows.append(BatchRow(request, request.slot, start, count, False, samples, new_page_start, new_pages))
        request.num_computed = end
        if samples:
            request.num_in_flight += 1
            entry.to_sample -= 1
        return count

    def _note_admission(self, request: Request) -> None:
        """Times and counts the first admission; one after a preemption is no new look-up."""
        if request.scheduled_time is None:
            request.scheduled_time = time.monotonic()
            request.num_cached = request.num_computed
            if request.index == 0:
                self.prompt_tokens_cached += request.num_cached
            if self.running.sharing.looks_up(request):
                self.prefix_queries += request.num_prompt_tokens
                self.prefix_hits += request.num_cached

    def _make_room(self, entry: Entry) -> bool:
        """Sees to it that a page can be allocated in every group, by preempting the last of `running` until one can.
        False: that was `entry` itself."""
        while not self.running.has_room:
            victim = self.running.entries[-1]
            self._preempt(victim)
            if victim is entry:
                return False
        return True

    def commit(self, batch: Batch, tokens: Sequence[int]) -> list[tuple[BatchRow, int]]:
        """Takes the tokens of a step: tokens[i], an int, is what batch.rows[i] sampled (any int if none).

        Steps are committed in their order. Returns the rows whose token was appended to its request; a
        request that has ended since the step was dispatched gets nothing. Ends those whose token is an end
        token or the last one.
        """
        if batch.step_id <= self._last_commit or len(tokens) != len(batch.rows):
            raise ValueError(
                f"step {batch.step_id} with {len(tokens)} tokens for {len(batch.rows)} rows after step "
                f"{self._last_commit}: expected one token per row and steps in order"
            )
        self._last_commit = batch.step_id
        appended: list[tuple[BatchRow, int]] = []
        entries = self.entries
        now = time.monotonic()
        for row, token in zip(batch.rows, tokens):
            if not row.samples:
                continue
            request = row.request
            request.num_in_flight -= 1
            entry = entries.get(request)
            if entry is None:
                continue
            # If it was preempted since, the token is as good as any: it was sampled before its pages changed
            # hands. It cannot be running again yet: it waits for its tokens in flight.
            output = request.output_token_ids
            output.append(token)
            appended.append((row, token))
            known = len(request.prompt_token_ids) + len(output)
            if len(output) == 1:
                request.first_token_time = now
            if known >= entry.register_at:
                self.running.sharing.register(entry)
            if token in request.end_token_ids:
                is_stop_token = token in request.params.stop_token_ids
                reason = token if is_stop_token else request.stop_names.get(token)
                self._end(entry, FinishReason.STOP, reason)
            elif known >= entry.limit:
                self._end(entry, FinishReason.LENGTH, None)
        return appended

    # ---- leaving the running set

    def _preempt(self, entry: Entry) -> None:
        """Takes everything from a running entry and puts it back into the queue, ahead of all that came after
        it. Its tokens in flight stay valid and are appended at their commit."""
        self.running.leave(entry)
        request = entry.request
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        self.preemptions += 1
        self.queue.push(entry)

    def _end(self, entry: Entry, reason: FinishReason, stop_reason: int | str | None) -> None:
        """Ends a request wherever it is: running, queued or parked."""
        request = entry.request
        was_active = True
        if request.state is RequestState.RUNNING:
            self.running.leave(entry)
        elif entry.is_queued:
            self.queue.remove(entry)
        else:
            was_active = False
        if entry.parked_behind is not None:
            entry.parked_behind.forks.remove(entry)
            entry.parked_behind = None
            self._num_parked -= 1
        self._release_forks(entry)
        successor = self.shares.remove(entry, was_active)
        if successor is not None:
            self.queue.push(successor)
        del self.entries[request]
        same_id = self._by_id[request.request_id]
        same_id.remove(entry)
        if not same_id:
            del self._by_id[request.request_id]
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        request.finish_time = time.monotonic()

    # ---- forks

    def _prompt_is_computed(self, entry: Entry) -> bool:
        return entry.request.num_computed >= entry.request.num_prompt_tokens

    def _release_forks(self, leader: Entry) -> None:
        """The leader's prompt is computed, or it has ended: its forks take their place in the queue."""
        for fork in leader.forks:
            fork.parked_behind = None
            self._num_parked -= 1
            self._enqueue(fork)
        leader.forks.clear()
