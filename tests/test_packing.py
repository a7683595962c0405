"""The one array that a step uploads: every section at its place, floats by their bits, overflow told."""

import dataclasses
import struct
from typing import Any

import numpy as np
import pytest

from jinfer import SamplingParams
from jinfer.packing import (
    FIELDS,
    FLAG_PROMPT_LOGPROBS,
    FLAGS,
    NUM_DECODE,
    NUM_FIELDS,
    NUM_LIVE,
    NUM_TOKENS,
    StepShape,
    pack,
    slot_fields,
)
from jinfer.request import Request
from jinfer.schedule.batch import Batch, BatchRow

MIXED = StepShape(num_tokens=16, num_rows=4, num_page_updates=6, num_slots=4, decode_only=False)
DECODE = StepShape(num_tokens=4, num_rows=4, num_page_updates=4, num_slots=4, decode_only=True)


def request(prompt, slot, output=(), **values) -> Request:
    made = Request("r", tuple(prompt), SamplingParams(**values), seed=values.get("seed") or 0)
    made.slot, made.output_token_ids = slot, list(output)
    return made


def sections(batch: Batch, shape: StepShape):
    packed, spilled = pack(batch, shape)
    assert packed.dtype == np.int32
    assert packed.shape == (shape.size,)
    return {name: packed[a:b] for name, (a, b) in shape.sections.items()}, spilled


@pytest.mark.parametrize("shape", [MIXED, DECODE])
def test_sections_tile_the_array(shape):
    places = sorted(place for place in shape.sections.values() if place[0] < place[1])
    assert places[0][0] == 0
    assert [a for a, _ in places[1:]] == [b for _, b in places[:-1]]
    assert places[-1][1] == shape.size


def test_a_mixed_batch():
    decoding = request([1, 2, 3], 2, [4, 5])
    chunk = request(range(10, 22), 0, prompt_logprobs=1)
    again = request([30, 31], 3, [32, 33])  # preempted, now computed again with its output
    rows = [
        BatchRow(decoding, 2, 4, 1, True, True, 1, ()),
        BatchRow(chunk, 0, 3, 5, False, False, 1, [[7]]),
        BatchRow(again, 3, 0, 4, False, True, 0, [[8, 9]]),
    ]
    part, spilled = sections(Batch(0, rows, 1, 10, [again]), MIXED)
    assert spilled == []
    assert part["head"].tolist()[:3] == [3, 1, 10]
    assert (NUM_LIVE, NUM_DECODE, NUM_TOKENS) == (0, 1, 2)
    assert part["head"][FLAGS] == FLAG_PROMPT_LOGPROBS
    assert part["row_slot"].tolist() == [2, 0, 3, 4]
    assert part["row_count"].tolist() == [1, 5, 4, 0]
    assert part["row_context"].tolist() == [5, 8, 4, 0]
    assert part["row_sample"].tolist() == [1, 0, 1, 0]
    assert part["tokens"][:10].tolist() == [-1, 13, 14, 15, 16, 17, 30, 31, 32, 33]
    assert part["targets"][:10].tolist() == [0, 14, 15, 16, 17, 18, 0, 0, 0, 0]
    assert part["page_slot"].tolist() == [0, 3, 3, 4, 4, 4]
    assert part["page_index"][:3].tolist() == [1, 0, 1]
    assert part["page_id"][:3].tolist() == [7, 8, 9]
    assert part["admitted_slot"].tolist() == [3, 4, 4, 4]
    np.testing.assert_array_equal(part["admitted"][:NUM_FIELDS], slot_fields(again))


def test_the_last_chunk_of_a_prompt_has_no_target_for_its_last_token():
    asked = request([5, 6, 7], 1, prompt_logprobs=0)
    part, _ = sections(Batch(0, [BatchRow(asked, 1, 1, 2, False, True, 0, [[3]])], 0, 2, [asked]), MIXED)
    assert part["targets"][:2].tolist() == [7, 0]


def test_a_decode_batch_has_no_token_section():
    rows = [BatchRow(request([1], slot, [2]), slot, 8, 1, True, True, 1, [[slot + 5]]) for slot in (3, 1)]
    part, _ = sections(Batch(0, rows, 2, 2), DECODE)
    assert part["tokens"].size == part["admitted"].size == 0
    assert part["row_slot"].tolist() == [3, 1, 4, 4]
    assert part["row_context"].tolist() == [9, 9, 0, 0]
    assert part["page_id"][:2].tolist() == [8, 6]


def test_pages_that_do_not_fit_are_told():
    row = BatchRow(request(range(70), 1), 1, 64, 6, False, True, 0, [list(range(20, 29))])
    part, spilled = sections(Batch(0, [row], 0, 6, [row.request]), MIXED)
    assert part["page_id"].tolist() == [20, 21, 22, 23, 24, 25]
    assert spilled == [(1, 6, 26), (1, 7, 27), (1, 8, 28)]


def test_page_groups_share_places_and_have_their_own_pages():
    two = dataclasses.replace(MIXED, num_groups=2)
    assert two.size == MIXED.size + MIXED.num_page_updates
    decoding, found = request([1, 2], 2, [3]), request(range(20), 1)
    rows = [
        BatchRow(decoding, 2, 8, 1, True, True, 1, [[5], [6]]),
        BatchRow(found, 1, 16, 4, False, True, 0, [[7, 8, 9], [0, 3, 4]]),
    ]
    part, spilled = sections(Batch(0, rows, 1, 5, [found]), two)
    assert spilled == []
    assert part["page_slot"].tolist() == [2, 1, 1, 1, 4, 4]
    assert part["page_index"][:4].tolist() == [1, 0, 1, 2]
    assert part["page_id"].reshape(2, 6)[:, :4].tolist() == [[5, 7, 8, 9], [6, 0, 3, 4]]
    _, spilled = pack(Batch(0, rows, 1, 5, [found]), dataclasses.replace(two, num_page_updates=3))
    assert spilled == [(1, 2, 9, 4)]


def test_parameters_travel_as_their_bits():
    values: dict[str, Any] = {
        "temperature": 0.7,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.05,
        "presence_penalty": -0.25,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.1,
        "min_tokens": 4,
    }
    asked = dataclasses.replace(request([1, 2, 3], 0, **values), seed=-2)
    row: dict[str, int] = dict(zip(FIELDS, slot_fields(asked).tolist(), strict=True))
    for field, name in (
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("repetition", "repetition_penalty"),
        ("presence", "presence_penalty"),
        ("frequency", "frequency_penalty"),
    ):
        assert struct.unpack("f", struct.pack("i", row[field]))[0] == np.float32(values[name])
    assert (row["top_k"], row["prompt_length"], row["ban_until"]) == (12, 3, 7)
    low, high = row["seed_low"] & 0xFFFFFFFF, row["seed_high"] & 0xFFFFFFFF
    assert (high << 32 | low) == 2**64 - 2


def test_top_k_of_minus_one_means_all():
    assert slot_fields(request([1], 0, top_k=-1))[FIELDS.index("top_k")] == 0
