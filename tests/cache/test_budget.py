"""Sharing one budget of bytes between page groups."""

import pytest

from jinfer.cache.budget import Budget, Need


def budget(*needs, page_size=8, chunk=16, num_seqs=4, num_cached=0):
    return Budget([Need(*need) for need in needs], page_size, chunk, num_seqs, num_cached)


@pytest.mark.parametrize("num_bytes", [1000, 1001, 9999, 10**6])
def test_one_group_without_a_window_gets_all_of_it(num_bytes):
    assert budget((None, 10)).split(num_bytes, 64) == [num_bytes // 10]


def test_short_of_the_window_groups_get_equally_many_pages():
    b = budget((None, 10), (100, 50))
    # Four sequences of 5 pages in each group and the null pages; the odd bytes go to the full group.
    assert b.split((4 * 5 + 1) * 60 + 35, 64) == [21 + 3, 21]


def test_beyond_the_window_the_full_group_gets_the_rest():
    b = budget((None, 10), (17, 50))
    most = b.all_slots(4096)
    # 1 + ceil(16 / 8) pages each, a chunk of two pages more for one of them, and the null page.
    assert most == [4 * 512 + 1, 4 * 3 + 2 + 1]
    full, windowed = b.split(b.bytes_of(most) * 3 // 4, 4096)
    assert windowed == 15
    assert full == (b.bytes_of(most) * 3 // 4 - 15 * 50) // 10


def test_windows_of_sequences_that_ended_have_room_where_they_are_shorter_than_the_sequences():
    b = budget((None, 10), (17, 50), num_cached=6)
    assert b.all_slots(4096) == [4 * 512 + 1, 10 * 3 + 2 + 1]
    assert b.all_slots(24) == [4 * 3 + 1, 4 * 3 + 1]


def test_more_than_all_slots_use_is_shared_alike():
    b = budget((None, 10), (17, 50))
    most = b.all_slots(4096)
    assert b.split(2 * b.bytes_of(most), 4096) == [2 * count for count in most]


@pytest.mark.parametrize("window", [1, 5, 40, 1000])
@pytest.mark.parametrize("max_tokens", [1, 30, 64, 1000])
def test_whatever_fits_holds_one_whole_sequence_and_no_byte_too_many(window, max_tokens):
    b = budget((None, 24), (window, 100))
    least = b.bytes_of(b.one_sequence(max_tokens))
    for num_bytes in (least, least + 1, least + 99, 3 * least, 40 * least):
        pages = b.split(num_bytes, max_tokens)
        assert b.bytes_of(pages) <= num_bytes
        assert all(have >= need for have, need in zip(pages, b.one_sequence(max_tokens), strict=True))
        assert b.longest(pages, max_tokens) == max_tokens
        assert b.longest_of(num_bytes, max_tokens) == max_tokens


def test_the_longest_sequence_that_fits():
    b = budget((None, 10), (17, 50))
    for tokens in (8, 16, 80, 800):
        exactly = b.bytes_of(b.one_sequence(tokens))
        assert b.longest_of(exactly, 4096) == tokens
        assert b.longest_of(exactly - 1, 4096) == tokens - 8
    assert b.longest_of(59, 4096) == 0
    assert b.longest([11, 99], 4096) == 80
    assert b.longest([999, 3], 4096) == 16
    assert b.longest([999, 6], 4096) == 4096


def test_the_share_of_full_attention():
    b = budget((None, 10), (17, 50))
    assert b.fraction(16) == 1
    assert b.fraction(8 * 300) == pytest.approx((10 * 300 + 50 * 3) / (60 * 300))
