"""check_integrity really checks: each fault planted in the books is found."""

import pytest

from jinfer.cache.pages import IntegrityError


def held(s, index=0):
    return s.running.entries[index].held[0]


def pool(s):
    return s.groups[0].pool


def cache(s):
    return s.groups[0].cache


FAULTS = {
    "a page has two owners": (lambda s: held(s, 1).pages.__setitem__(3, held(s).pages[3]), "page"),
    "a page is leaked": (lambda s: pool(s).allocate(1), "owners, refcount differs"),
    "a page is dropped": (lambda s: held(s).pages.pop(), "do not end together"),
    "a page too many is held": (
        lambda s: setattr(s.running.entries[0], "page_end", held(s).pages.append(9) or 5),
        "too few or too many pages",
    ),
    "a refcount is off": (lambda s: pool(s).retain(held(s).pages[:1]), "owners, refcount differs"),
    "the null page is owned": (lambda s: held(s).pages.__setitem__(3, 0), "owners, refcount differs"),
    "a page sits elsewhere": (
        lambda s: held(s).pages.insert(0, held(s).pages.pop(1)),
        "two places of its owners' tables",
    ),
    "a page is given back too early": (
        lambda s: pool(s).release(held(s).let_go(1)),
        "that the window reaches was given back",
    ),
    "a slot has two owners": (
        lambda s: setattr(s.running.entries[0].request, "slot", 1),
        "slot is lost or has two owners",
    ),
    "a slot is lost": (lambda s: s.running.free_slots.pop(), "slot is lost"),
    "a promise is forgotten": (
        lambda s: setattr(s.groups[0], "reserved", 1),
        "reserved pages are miscounted",
    ),
    "pages held are miscounted": (lambda s: setattr(s.groups[0], "held", 1), "pages held are miscounted"),
    "waste is miscounted": (lambda s: setattr(s.running, "slack", 0), "unused token places are miscounted"),
    "the order is wrong": (lambda s: s.running.entries.reverse(), "out of order"),
    "a request is lost": (lambda s: s.running.entries.pop(), "a request is lost"),
    "a request is in two places": (lambda s: s.queue.push(s.running.entries[0]), "in two places"),
    "a fork is miscounted": (lambda s: setattr(s, "_num_parked", 1), "forks are miscounted"),
    "a waiting request holds pages": (
        lambda s: s.queue.head().held.append(held(s)),
        "waits and holds pages",
    ),
    "a partial page is findable": (
        lambda s: cache(s).insert(b"x", held(s).pages[3]),
        "findable but not full",
    ),
    "a page has another's key": (
        lambda s: (s.reset_prefix_cache(), cache(s).insert(b"x", held(s).pages[0])),
        "under another sequence's key",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_check_finds(name, make_scheduler, make_request, step):
    fault, message = FAULTS[name]
    s = make_scheduler(max_num_batched_tokens=64)
    s.add(make_request(range(14)))
    step(s)
    s.add(make_request(range(14)))
    s.add(make_request(5))
    step(s)
    s.add(make_request(5))
    assert (s.num_running, s.num_waiting) == (3, 1)
    s.check_integrity()
    fault(s)
    with pytest.raises(IntegrityError, match=message):
        s.check_integrity()


def test_an_idle_scheduler_that_still_holds_pages_is_found(make_scheduler):
    s = make_scheduler()
    s.check_integrity()
    pool(s).allocate(1)
    with pytest.raises(IntegrityError):
        s.check_integrity()
