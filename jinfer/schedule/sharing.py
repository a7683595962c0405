"""The prefix cache as the scheduler uses it: which of an entry's pages are cached, and which become so.

A beginning of n pages is of use to a sequence if every group still has what the next token needs: a full group all n
pages, a windowed group those that reach into the window before position n * page_size. The key of a page is the same in
all groups, and each group finds its own page by it.

Every page that a window leaves behind could serve a sequence that parts from this one just there. Most never do, and in
the order of their last use they would push out what is asked for: the last windows of sequences that ended, where the
next turn of a conversation goes on. So they are evicted first, but for three kinds: pages that were found; the window
before the end of the prompt, which may be sent again or answered otherwise; and the one before the place where the full
groups had no more, because there an earlier sequence took another way, and others may. (Without a full group nothing
tells that place.)
"""

from __future__ import annotations

from collections.abc import Sequence

from jinfer.cache.groups import PageGroup
from jinfer.cache.prefix import page_key, root_key
from jinfer.request import Request
from jinfer.schedule.entry import NEVER, Entry


class PageSharing:
    """Hashes an entry's pages, each at most once, and only when it is looked up or has filled."""

    def __init__(self, groups: Sequence[PageGroup], page_size: int, only_forks: bool) -> None:
        self._full = [group for group in groups if group.window is None]
        self._windowed = [group for group in groups if group.window is not None]
        self._groups = groups
        self._page_size = page_size
        self._only_forks = only_forks

    def looks_up(self, request: Request) -> bool:
        """Whether this request may use cached pages."""
        # Logprobs of the prompt need every prompt token computed. Those of a group come from its leader.
        if request.leader is not None:
            return request.cacheable
        return request.cacheable and not self._only_forks and request.params.prompt_logprobs is None

    def find(self, entry: Entry, num_tokens: int) -> None:
        """Sets `num_found` to the pages of the longest usable beginning of the entry's first `num_tokens` tokens, which
        are known.

        At least the last token is left to compute: its logits are needed.
        """
        entry.num_found = entry.num_full_found = 0
        if not self.looks_up(entry.request):
            return
        most = (num_tokens - 1) // self._page_size
        for group in self._full:
            most = self._run_from_start(entry, group, most)
        entry.num_full_found = most
        # What one windowed group shortens, the others must look at again: they then need earlier pages.
        settled = 0
        while most and settled < len(self._windowed):
            settled = 0
            for group in self._windowed:
                found = self._run_to_end(entry, group, most)
                settled += found == most
                most = found
        entry.num_found = most

    def release_behind(self, entry: Entry, group: PageGroup, first: int, pages: Sequence[int]) -> None:
        """Gives back pages at places [first, first + len) of the entry's table, which its window has left behind."""
        ends = (entry.num_full_found, (entry.request.num_prompt_tokens - 1) // self._page_size)
        parting = [range(group.first_page(end * self._page_size), end) for end in ends]
        for place, page in enumerate(pages, first):
            is_likely = place < entry.num_found or any(place in window for window in parting)
            group.pool.release((page,), evict_first=not is_likely)

    def pages(self, entry: Entry, group: PageGroup, first: int, count: int) -> list[int]:
        """The cached pages [first, count) of a beginning that `find` found. The caller retains them."""
        pages: list[int] = []
        for index in range(first, count):
            page = group.cache.find(self._key(entry, index))
            assert page is not None
            pages.append(page)
        return pages

    def _run_from_start(self, entry: Entry, group: PageGroup, most: int) -> int:
        """The first of the pages [0, most) that the group does not have."""
        for index in range(most):
            if group.cache.find(self._key(entry, index)) is None:
                return index
        return most

    def _run_to_end(self, entry: Entry, group: PageGroup, most: int) -> int:
        """The longest beginning of at most `most` pages whose last window the group has."""
        end = index = most
        while index > group.first_page(end * self._page_size):
            index -= 1
            if group.cache.find(self._key(entry, index)) is None:
                end = index
        return end

    def start_registering(self, entry: Entry, num_found: int) -> None:
        """Pages behind the first `num_found` become findable as they fill, if the request allows it."""
        entry.register_at = (num_found + 1) * self._page_size if entry.request.cacheable else NEVER

    def register(self, entry: Entry) -> None:
        """Makes the pages findable whose KV is dispatched and whose tokens are all known."""
        request = entry.request
        ready = min(request.num_computed, request.num_known_tokens)
        while ready >= entry.register_at:
            index = entry.register_at // self._page_size - 1
            key = self._key(entry, index)
            for group, held in zip(self._groups, entry.held):
                # A short window may have let go of a page before its tokens are known.
                if index >= held.first:
                    group.cache.insert(key, held.pages[index])
            entry.register_at += self._page_size

    def forget(self, request: Request) -> None:
        """Makes every page of this request's tokens unfindable, whoever wrote it."""
        key = root_key(request.cache_salt)
        for start in range(0, request.num_known_tokens - self._page_size + 1, self._page_size):
            key = page_key(key, request.token_slice(start, start + self._page_size))
            for group in self._groups:
                group.cache.forget(key)

    def _key(self, entry: Entry, index: int) -> bytes:
        keys = entry.keys
        while len(keys) <= index:
            parent = keys[-1] if keys else root_key(entry.request.cache_salt)
            start = len(keys) * self._page_size
            keys.append(page_key(parent, entry.request.token_slice(start, start + self._page_size)))
        return keys[index]
