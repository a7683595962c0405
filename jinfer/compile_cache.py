"""The folder of compiled programs behind jax's persistent cache, with entries that heal.

jax's own cache writes an entry in place, and neither deletes nor replaces one that it cannot read: after a full disk
each start warns and compiles again, for good. Here an entry is written beside its place and moved there, checked when
it is read, and deleted if it is damaged or if another user could have written it. Names and contents are jax's own.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from pallas_kernels import userfiles

logger = logging.getLogger(__name__)

SUFFIX = "-cache"


def install(folder: Path) -> bool:
    """Makes jax keep its compiled programs in `folder` by this module's rules; False if it does it by its own.

    That is so where jax has opened its cache already, where its cache was limited or checked by settings of its own,
    and in a jax whose cache is built otherwise. jax has no public door for this; a test holds that this one opens.
    """
    import jax

    try:
        from jax._src import compilation_cache
    except ImportError:
        return False
    has_settings = (
        getattr(jax.config, "jax_compilation_cache_max_size", -1) != -1
        or getattr(jax.config, "jax_compilation_cache_check_contents", False)
    )  # fmt: skip
    unpack = getattr(compilation_cache, "decompress_executable", None)
    if has_settings or unpack is None or getattr(compilation_cache, "_cache", folder) is not None:
        return False
    compilation_cache._cache = ProgramCache(folder, unpack)  # type: ignore[assignment]  # of the same form
    return True


class ProgramCache:
    """Entries by key, as jax asks for them.

    unpack: returns the uncompressed bytes of an entry, and raises whatever it likes for one that is damaged.
    """

    def __init__(self, folder: Path, unpack: Any) -> None:
        self._path = folder  # jax names it in its log
        self._unpack = unpack
        self._has_warned = False

    def get(self, key: str) -> bytes | None:
        """The entry, or None if there is none that can be used."""
        file = self._path / f"{key}{SUFFIX}"
        try:
            data = userfiles.read(file)
            self._unpack(data)
        except FileNotFoundError:
            return None
        except Exception as error:
            self._warn(
                f"the compiled program {file} is deleted and made again: {type(error).__name__}: {error}"
            )
            with contextlib.suppress(OSError):
                file.unlink()
            return None
        return data

    def put(self, key: str, value: bytes) -> None:
        """Keeps an entry if it can; replaces one with the same key, which jax could not use."""
        try:
            userfiles.write(self._path / f"{key}{SUFFIX}", value)
        except OSError as error:
            self._warn(f"compiled programs cannot be kept in {self._path}: {error}")

    def _warn(self, text: str) -> None:
        """One warning for a process: what is wrong with one entry is often wrong with many."""
        logger.log(logging.DEBUG if self._has_warned else logging.WARNING, "%s", text)
        self._has_warned = True
