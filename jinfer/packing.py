"""One int32 array carries everything that a step needs from the host.

`StepShape` is the compile key. Its sections, in order:

    head        4              number of live rows, of decode rows, of live tokens; bits of `FLAGS`
    row_slot    R              slot of each row; the trash slot for padded rows
    row_count   R              tokens of each row in this step; 0 for padded rows
    row_context R              KV length after this step
    row_sample  R              1 if the row's last token yields a token
    page_slot, page_index   D each    places of the page tables that are new since the last step, in every group
    page_id     D x G          their pages, group by group
    tokens      T              mixed steps: token ids of prompt chunks, -1 where the slot's last token is meant
    targets     T              mixed steps: the next token of the prompt, for prompt log-probabilities
    admitted    A x FIELDS     mixed steps: sampling parameters of slots that got a new request

Floats travel as their bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jinfer.request import Request, RequestFault
from jinfer.sampling import features
from jinfer.schedule.batch import Batch, BatchRow

NUM_LIVE, NUM_DECODE, NUM_TOKENS, FLAGS = range(4)
FLAG_PROMPT_LOGPROBS = 1
FLAG_POOLED = 2

# Columns of the per-slot parameter table.
FIELDS = (
    "features",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition",
    "presence",
    "frequency",
    "seed_low",
    "seed_high",
    "prompt_length",
    "ban_until",
)
NUM_FIELDS = len(FIELDS)
PROMPT_LENGTH = FIELDS.index("prompt_length")


@dataclass(frozen=True)
class StepShape:
    """Static sizes of one compiled step. decode_only: every row has one token, so T == R."""

    num_tokens: int
    num_rows: int
    num_page_updates: int
    num_slots: int
    decode_only: bool
    num_groups: int = 1

    @property
    def num_admitted(self) -> int:
        return 0 if self.decode_only else min(self.num_rows, self.num_tokens)

    @cached_property
    def sections(self) -> dict[str, tuple[int, int]]:
        """(start, stop) of each section."""
        t = 0 if self.decode_only else self.num_tokens
        r, d = self.num_rows, self.num_page_updates
        sizes = {
            "head": 4,
            "row_slot": r,
            "row_count": r,
            "row_context": r,
            "row_sample": r,
            "page_slot": d,
            "page_index": d,
            "page_id": d * self.num_groups,
            "tokens": t,
            "targets": t,
            "admitted_slot": self.num_admitted,
            "admitted": self.num_admitted * NUM_FIELDS,
        }
        result, start = {}, 0
        for name, size in sizes.items():
            result[name] = (start, start + size)
            start += size
        return result

    @cached_property
    def size(self) -> int:
        return max(stop for _, stop in self.sections.values())

    @property
    def trash_slot(self) -> int:
        return self.num_slots

    def __str__(self) -> str:
        return f"decode[{self.num_rows}]" if self.decode_only else f"mixed[{self.num_tokens}]"


def slot_fields(request: Request) -> np.ndarray:
    """int32[NUM_FIELDS]: a request's row of the per-slot parameter table."""
    p = request.params
    row = np.zeros(NUM_FIELDS, np.int32)
    row[0] = features.of(p)
    row[2] = max(p.top_k, 0)
    row[1], row[3:8] = (
        np.float32(p.temperature).view(np.int32),
        np.array(
            [p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty], np.float32
        ).view(np.int32),
    )
    seed = request.seed & 0xFFFF_FFFF_FFFF_FFFF
    row[8:10] = np.array([seed & 0xFFFF_FFFF, seed >> 32], np.uint32).view(np.int32)
    row[PROMPT_LENGTH] = max(request.num_prompt_tokens, request.num_recomputed)
    row[11] = min(request.num_prompt_tokens + p.min_tokens, np.iinfo(np.int32).max)
    return row


def _admitted_fields(request: Request) -> np.ndarray:
    """`slot_fields` of a request as it stands; made anew only where it was not packed at its admission."""
    if request.packed is None:
        return slot_fields(request)
    row = request.packed.copy()
    row[PROMPT_LENGTH] = max(row[PROMPT_LENGTH], request.num_recomputed)
    return row


def pack(batch: Batch, shape: StepShape) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """The packed array, and the page-table entries (slot, index, a page per group) that did not fit into it.

    Raises:
      RequestFault: a request's own data cannot be packed.
    """
    packed = np.zeros(shape.size, np.int32)
    view = {name: packed[a:b] for name, (a, b) in shape.sections.items()}
    rows = batch.rows
    n = len(rows)
    view["row_slot"][n:] = shape.trash_slot
    view["row_slot"][:n] = [row.slot for row in rows]
    starts = [row.start for row in rows]
    if shape.decode_only:  # one token each, and each is sampled
        view["row_count"][:n] = view["row_sample"][:n] = 1
        view["row_context"][:n] = starts
        view["row_context"][:n] += 1
    else:
        counts = [row.count for row in rows]
        view["row_count"][:n] = counts
        view["row_context"][:n] = starts
        view["row_context"][:n] += counts
        view["row_sample"][:n] = [row.samples for row in rows]
    updates = [
        (row.slot, row.new_page_start + i, *pages)
        for row in rows
        if row.new_pages
        for i, pages in enumerate(zip(*row.new_pages))
    ]
    room = shape.num_page_updates
    spilled = updates[room:]
    updates = updates[:room]
    m = len(updates)
    view["page_slot"][m:] = shape.trash_slot
    if m:
        view["page_slot"][:m], view["page_index"][:m], *pages = zip(*updates, strict=True)
        view["page_id"].reshape(shape.num_groups, room)[:, :m] = pages
    flags = 0
    if not shape.decode_only:
        flags = _pack_tokens(batch, view)
        view["admitted_slot"][:] = shape.trash_slot
        table = view["admitted"].reshape(-1, NUM_FIELDS)
        for i, request in enumerate(batch.admitted):
            view["admitted_slot"][i] = request.slot
            try:
                table[i] = _admitted_fields(request)
            except Exception as error:
                raise RequestFault(request, error) from error
    view["head"][:] = (n, batch.num_decode_rows, batch.num_tokens, flags)
    return packed, spilled


def _pack_tokens(batch: Batch, view: dict[str, np.ndarray]) -> int:
    """Fills `tokens` and `targets`; returns the step's flags."""
    at, flags = 0, 0
    tokens, targets = view["tokens"], view["targets"]
    for row in batch.rows:
        if row.from_slot:
            tokens[at] = -1
        else:
            section = slice(at, at + row.count)
            try:
                flags |= _pack_chunk(row, tokens[section], targets[section])
            except Exception as error:
                raise RequestFault(row.request, error) from error
        at += row.count
    return flags


def _pack_chunk(row: BatchRow, tokens: np.ndarray, targets: np.ndarray) -> int:
    request, stop, flags = row.request, row.start + row.count, 0
    tokens[:] = request.token_slice(row.start, stop)
    if request.pooling is not None:
        flags |= FLAG_POOLED
    if request.params.prompt_logprobs is not None and row.start < request.num_prompt_tokens:
        flags |= FLAG_PROMPT_LOGPROBS
        following = request.prompt_token_ids[row.start + 1 : stop + 1]
        targets[: len(following)] = following
    return flags
