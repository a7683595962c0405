"""The prefix cache: finds the page that already holds the KV of these tokens after that beginning.

A page's key names its tokens and everything before them:

    key[i] = blake2b(key[i - 1] + tokens[i * page_size, (i + 1) * page_size)),   key[-1] = blake2b(salt)

so equal keys mean equal beginnings, up to a collision of a 256-bit cryptographic hash (a weaker hash would
let one user craft a prompt that reads another's pages). Requests with different salts never share. Only full
pages have keys.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from jinfer.cache.pages import PagePool, require

_KEY_BYTES = 32


def root_key(salt: str) -> bytes:
    """The parent of a first page's key."""
    # A JSON body may carry lone surrogates; they must not raise here, nor collide with a real character.
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES, person=b"salt").digest()


def page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of the page that holds `token_ids`, behind the page (or root) whose key is `parent`."""
    # Eight bytes a token, whatever the platform's int: two lists of ids never have the same bytes.
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=_KEY_BYTES, person=b"page").digest()


class PrefixCache:
    """Maps keys to pages of one pool. It owns none: a kept page stays findable until the pool evicts it."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        pool.on_evict = self._evicted

    def __len__(self) -> int:
        return len(self._pages)

    def find(self, key: bytes) -> int | None:
        """The page with this key. The caller retains it before the pool may evict it."""
        return self._pages.get(key)

    def key_of(self, page: int) -> bytes | None:
        return self._keys.get(page)

    def insert(self, key: bytes, page: int) -> None:
        """Makes a used, full page findable.

        If another page has the key already, that one stays, and this one stays private: freed with its owner.
        """
        if key not in self._pages:
            self._pool.keep(page)
            self._pages[key] = page
            self._keys[page] = key

    def forget(self, key: bytes) -> None:
        """Makes the page with this key, if there is one, unfindable. If it is in use, it stays with its users."""
        page = self._pages.pop(key, None)
        if page is not None:
            del self._keys[page]
            self._pool.forget(page)

    def reset(self) -> None:
        """Forgets every page. Those in use stay with their users and are freed after them."""
        # Reversed: insertion order has parents first, and the free stack then hands out low ids first again.
        for page in reversed(self._keys):
            self._pool.forget(page)
        self._pages.clear()
        self._keys.clear()

    def _evicted(self, page: int) -> None:
        del self._pages[self._keys.pop(page)]

    def check_integrity(self) -> None:
        """Raises IntegrityError unless the two maps mirror each other."""
        require(len(self._pages) == len(self._keys), "the prefix cache's two maps differ in size")
        for key, page in self._pages.items():
            require(self._keys.get(page) == key, f"page {page} has another key than the one that finds it")
            require(self._pool.is_kept(page), f"page {page} can be found but is not kept")
        require(self._pool.num_cached <= len(self._pages), "a cached page cannot be found")
