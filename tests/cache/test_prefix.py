"""The prefix cache: what a key depends on, and that a key finds its page exactly as long as the page holds it."""

import pytest

from jinfer.cache.pages import IntegrityError, PagePool
from jinfer.cache.prefix import PrefixCache, page_key, root_key


def test_a_key_names_its_tokens_their_order_and_everything_before():
    root = root_key("")
    keys = {
        page_key(root, [1, 2]),
        page_key(root, [2, 1]),
        page_key(root, [1, 3]),
        page_key(page_key(root, [1, 2]), [1, 2]),
        page_key(page_key(root, [1, 3]), [1, 2]),
        page_key(root_key("tenant"), [1, 2]),
    }
    assert len(keys) == 6
    assert page_key(root_key("tenant"), (1, 2)) in keys


def test_tokens_cannot_run_into_each_other():
    root = root_key("")
    # Written as bytes or decimal digits without a fixed width, these lists would look alike.
    assert page_key(root, [1, 23]) != page_key(root, [12, 3])
    assert page_key(root, [256, 0]) != page_key(root, [0, 1])
    assert page_key(root, [0]) != page_key(root, [0, 0])


def test_a_salt_may_be_any_string():
    salts = ["", "a", "é", "\ud800", "\udfff", "a\0"]
    assert len({root_key(salt) for salt in salts}) == len(salts)


def test_a_page_is_findable_until_it_is_evicted():
    pool = PagePool(3)
    cache = PrefixCache(pool)
    pages = pool.allocate(2)
    cache.insert(b"x", pages[0])
    assert (cache.find(b"x"), cache.find(b"y"), cache.key_of(pages[0])) == (pages[0], None, b"x")
    pool.release(pages)
    assert cache.find(b"x") == pages[0]
    pool.allocate(1)
    assert cache.find(b"x") == pages[0]
    pool.allocate(1)
    assert cache.find(b"x") is None
    assert len(cache) == 0
    cache.check_integrity()


def test_the_first_page_keeps_a_key_and_the_second_stays_private():
    pool = PagePool(4)
    cache = PrefixCache(pool)
    first, second = pool.allocate(2)
    cache.insert(b"x", first)
    cache.insert(b"x", second)
    assert cache.find(b"x") == first
    assert not pool.is_kept(second)
    pool.release([second, first])
    assert (pool.num_free, pool.num_cached) == (2, 1)
    cache.check_integrity()


def test_reset_forgets_used_and_unused_pages():
    pool = PagePool(4)
    cache = PrefixCache(pool)
    used, unused = pool.allocate(2)
    cache.insert(b"u", used)
    cache.insert(b"n", unused)
    pool.release([unused])
    cache.reset()
    assert (cache.find(b"u"), cache.find(b"n"), len(cache)) == (None, None, 0)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (1, 0, 2)
    pool.release([used])
    assert pool.num_free == 3
    pool.check_integrity()
    cache.check_integrity()


def test_the_integrity_check_finds_a_page_that_is_findable_but_not_kept():
    pool = PagePool(3)
    cache = PrefixCache(pool)
    (page,) = pool.allocate(1)
    cache.insert(b"x", page)
    cache.check_integrity()
    pool.forget(page)
    with pytest.raises(IntegrityError, match="not kept"):
        cache.check_integrity()
