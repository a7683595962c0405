"""The prefix cache as the scheduler uses it: which of an entry's pages are cached, and which become so."""

from __future__ import annotations

from jinfer.cache.pages import PagePool
from jinfer.cache.prefix import PrefixCache, page_key, root_key
from jinfer.request import Request
from jinfer.schedule.entry import NEVER, Entry


class PageSharing:
    """Hashes an entry's pages, each at most once, and only when it is looked up or has filled."""

    def __init__(self, pool: PagePool, page_size: int, only_forks: bool) -> None:
        self.cache = PrefixCache(pool)
        self._page_size = page_size
        self._only_forks = only_forks

    def looks_up(self, request: Request) -> bool:
        """Whether this request may use cached pages."""
        # Logprobs of the prompt need every prompt token computed. Those of a group come from its leader.
        if request.leader is not None:
            return request.cacheable
        return request.cacheable and not self._only_forks and request.params.prompt_logprobs is None

    def find(self, entry: Entry, num_tokens: int) -> list[int]:
        """Cached pages of the longest beginning of the entry's first `num_tokens` tokens, which are known.

        At least the last token is left to compute: its logits are needed. The caller retains the pages.
        """
        pages: list[int] = []
        if self.looks_up(entry.request):
            for index in range((num_tokens - 1) // self._page_size):
                page = self.cache.find(self._key(entry, index))
                if page is None:
                    break
                pages.append(page)
        return pages

    def start_registering(self, entry: Entry, num_found: int) -> None:
        """Pages behind the first `num_found` become findable as they fill, if the request allows it."""
        entry.register_at = (num_found + 1) * self._page_size if entry.request.cacheable else NEVER

    def register(self, entry: Entry) -> None:
        """Makes the pages findable whose KV is dispatched and whose tokens are all known."""
        request = entry.request
        ready = min(request.num_computed, request.num_known_tokens)
        while ready >= entry.register_at:
            index = entry.register_at // self._page_size - 1
            self.cache.insert(self._key(entry, index), entry.pages[index])
            entry.register_at += self._page_size

    def _key(self, entry: Entry, index: int) -> bytes:
        keys = entry.keys
        while len(keys) <= index:
            parent = keys[-1] if keys else root_key(entry.request.cache_salt)
            start = len(keys) * self._page_size
            keys.append(page_key(parent, entry.request.token_slice(start, start + self._page_size)))
        return keys[index]
