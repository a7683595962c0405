"""The page pool: three states, refcounts, and who is evicted first."""

import pytest

from jinfer.cache.pages import IntegrityError, PagePool
from jinfer.errors import ConfigError


def test_every_page_but_the_null_page_is_handed_out_once():
    pool = PagePool(6)
    assert sorted(pool.allocate(5)) == [1, 2, 3, 4, 5]
    assert (pool.num_total, pool.num_used, pool.num_free, pool.num_available) == (5, 5, 0, 0)
    pool.check_integrity()


def test_asking_for_more_than_available_changes_nothing():
    pool = PagePool(4)
    with pytest.raises(IntegrityError, match="4 pages asked, 3 available"):
        pool.allocate(4)
    assert pool.num_free == 3
    pool.check_integrity()


def test_released_private_pages_are_free_and_kept_ones_cached():
    pool = PagePool(4)
    kept, private = pool.allocate(2)
    pool.keep(kept)
    pool.release([private, kept])
    assert (pool.num_free, pool.num_cached, pool.num_used) == (2, 1, 0)
    pool.check_integrity()


def test_a_shared_page_stays_until_its_last_user_leaves():
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    pool.keep(page)
    pool.retain([page])
    assert pool.refcount(page) == 2
    pool.release([page])
    assert (pool.refcount(page), pool.num_cached) == (1, 0)
    pool.release([page])
    assert (pool.refcount(page), pool.num_cached) == (0, 1)


def test_free_pages_go_before_cached_ones_and_those_in_order_of_release():
    pool = PagePool(5)
    a, b, c, d = pool.allocate(4)
    evicted = []
    pool.on_evict = evicted.append
    for page in (a, b, c):
        pool.keep(page)
    pool.release([b, a, d, c])
    assert pool.allocate(1) == [d]
    assert evicted == []
    assert pool.allocate(3) == [b, a, c] == evicted
    assert pool.num_cached == 0
    pool.check_integrity()


def test_pages_may_be_released_to_be_evicted_first():
    pool = PagePool(4)
    a, b, c = pool.allocate(3)
    for page in (a, b, c):
        pool.keep(page)
    pool.release([a])
    pool.release([b], evict_first=True)
    pool.release([c])
    assert pool.allocate(3) == [b, a, c]


def test_using_a_cached_page_makes_it_the_most_recent():
    pool = PagePool(4)
    a, b, c = pool.allocate(3)
    for page in (a, b, c):
        pool.keep(page)
    pool.release([a, b, c])
    pool.retain([a])
    pool.release([a])
    assert pool.allocate(3) == [b, c, a]


def test_a_private_page_cannot_be_shared():
    pool = PagePool(3)
    with pytest.raises(IntegrityError, match="private"):
        pool.retain(pool.allocate(1))


def test_a_page_cannot_be_released_twice():
    pool = PagePool(3)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(IntegrityError, match="released more often"):
        pool.release(pages)


def test_an_unused_page_cannot_be_kept():
    with pytest.raises(IntegrityError, match="not in use"):
        PagePool(3).keep(1)


@pytest.mark.parametrize("in_use", [True, False])
def test_a_forgotten_page_is_freed_at_once_or_after_its_last_user(in_use):
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    pool.keep(page)
    if in_use:
        pool.forget(page)
        assert pool.num_used == 1
        pool.release([page])
    else:
        pool.release([page])
        pool.forget(page)
    assert (pool.num_free, pool.num_cached) == (2, 0)
    pool.check_integrity()


def test_a_pool_without_a_usable_page_is_refused():
    with pytest.raises(ConfigError, match="1 pages, expected at least 2"):
        PagePool(1)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda pool: pool._free.append(pool._free[0]), "free twice"),
        (lambda pool: pool._free.pop(), "lost"),
        (lambda pool: pool._free.append(0), "null page"),
        (lambda pool: pool._refcounts.__setitem__(pool._free[0], 1), "two states"),
        (lambda pool: pool._is_kept.__setitem__(pool._free[0], True), "free and kept"),
        (lambda pool: pool._is_kept.__setitem__(next(iter(pool._cached)), False), "not kept"),
    ],
)
def test_the_integrity_check_finds(break_it, message):
    pool = PagePool(5)
    pages = pool.allocate(2)
    pool.keep(pages[0])
    pool.release(pages)
    pool.check_integrity()
    break_it(pool)
    with pytest.raises(IntegrityError, match=message):
        pool.check_integrity()
