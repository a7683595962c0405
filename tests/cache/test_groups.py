"""Which pages a window needs, against counting every position; and what a group may promise."""

import pytest

from jinfer.cache.groups import GroupSize, PageGroup, capacity_tokens, first_page, most_pages, window_pages


def pages_seen(start, end, window, size):
    """Pages of every position that a token in [start, end) sees, by looking at each."""
    seen = {position // size for p in range(start, end) for position in range(max(0, p - window + 1), p + 1)}
    return sorted(seen)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 30])
def test_the_pages_held_are_those_that_are_seen(size, window):
    for start in range(40):
        for chunk in (1, 2, 5, 11):
            seen = pages_seen(start, start + chunk, window, size)
            assert seen[0] == first_page(start, window, size)
            assert seen == list(range(seen[0], (start + chunk - 1) // size + 1))


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 30])
@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
def test_the_most_pages_are_what_the_worst_place_needs(size, window, chunk):
    worst = max(len(pages_seen(start, start + chunk, window, size)) for start in range(40, 40 + size))
    assert window_pages(window, size, chunk) == worst
    assert most_pages(10**6, window, size, chunk) == worst
    assert most_pages(size + 1, window, size, chunk) == min(2, worst)
    assert most_pages(100, None, size, chunk) == -(-100 // size)


def test_a_prompt_is_promised_what_it_holds_at_once():
    full, windowed = PageGroup(GroupSize(99), 4, 8), PageGroup(GroupSize(99, 6), 4, 8)
    assert full.prefill_pages(0, 50) == 13
    # 5 tokens before a chunk of 8 reach over at most 4 pages.
    assert [windowed.prefill_pages(0, end) for end in (3, 12, 16, 50)] == [1, 3, 4, 4]
    assert windowed.prefill_pages(40, 50) == 4
    assert windowed.prefill_pages(44, 50) == 13 - 9
    assert windowed.prefill_pages(48, 50) == 13 - 10
    assert (windowed.decode_pages(50), full.decode_pages(50)) == (3, 13)


def test_every_holder_of_a_windowed_page_is_charged_for_it():
    """What is shared does not come back when one of its holders has moved on."""
    full, windowed = PageGroup(GroupSize(11), 4, 8), PageGroup(GroupSize(11, 6), 4, 8)
    for group in (full, windowed):
        pages = group.pool.allocate(3)
        for page in pages:
            group.pool.keep(page)
        group.pool.retain(pages)
        group.held, group.reserved = 6, 2
    assert (full.num_unclaimed, windowed.num_unclaimed) == (10 - 3 - 2, 10 - 6 - 2)


def test_what_one_sequence_can_have():
    full, short = PageGroup(GroupSize(11), 4, 8), PageGroup(GroupSize(5, 6), 4, 8)
    tight = PageGroup(GroupSize(4, 6), 4, 8)
    assert (full.capacity_tokens, short.capacity_tokens, tight.capacity_tokens) == (40, None, 12)
    assert capacity_tokens([full, short]) == 40
    assert capacity_tokens([full, tight]) == 12
    assert capacity_tokens([short]) is None
