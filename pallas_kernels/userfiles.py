"""Folders and files that hold machine code: it runs as this user, so nobody else may have written it."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path


class UnsafeError(OSError):
    """A folder or a file that another user could have written to; the message says what to do."""


def is_safe(found: os.stat_result) -> bool:
    """True if only this user and root can write to what has this status."""
    return os.name != "posix" or (found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o022)


def make_folder(folder: Path) -> Path:
    """The folder, made for this user alone if it is not there.

    Raises:
      UnsafeError: others own it or may write to it. OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if not is_safe(found):
        is_own = found.st_uid == os.getuid()
        remedy = (
            f"empty it and chmod 700 {folder}"
            if is_own
            else f"name one of your own, such as {folder}/{_own()}"
        )
        raise UnsafeError(
            f"{folder} belongs to user {found.st_uid} and has mode {stat.S_IMODE(found.st_mode):o}: others could put "
            f"machine code there that would run as user {os.getuid()}; {remedy}"
        )
    return folder


def cache_folder(name: str) -> Path | None:
    """A folder for this user's cached machine code, or None where none can be had.

    In the user's cache as the XDG base directory specification has it; where that cannot be written (no home, an
    unknown user, a file system that is read-only), in the system's folder for temporary files.
    """
    for find_base in (_user_cache, _temporary_cache):
        with contextlib.suppress(OSError, RuntimeError):
            folder = make_folder(find_base() / name)
            if os.access(folder, os.W_OK):
                return folder
    return None


def _user_cache() -> Path:
    """Raises RuntimeError if there is no HOME and the system does not know the user."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"


def _temporary_cache() -> Path:
    """A folder beside everybody's; a link there could lead anywhere, so it has to be a folder itself."""
    folder = make_folder(Path(tempfile.gettempdir()) / f"cache-{_own()}")
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise UnsafeError(f"{folder} is a link")
    return folder


def _own() -> str:
    return f"{os.getuid()}" if os.name == "posix" else "user"


def read(file: Path) -> bytes:
    """The bytes of a file.

    Raises:
      UnsafeError: others own it or may write to it. OSError: it is not there or cannot be read.
    """
    with open(file, "rb") as opened:
        found = os.fstat(opened.fileno())
        if not is_safe(found):
            raise UnsafeError(
                f"{file} belongs to user {found.st_uid} and has mode {stat.S_IMODE(found.st_mode):o}"
            )
        return opened.read()


def write(file: Path, data: bytes) -> None:
    """Writes a file beside its place and moves it there, so that nobody ever finds half of it.

    Raises:
      OSError: it cannot be written whole; then nothing of it is left.
    """
    handle, beside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name[:40]}-")
    try:
        with open(handle, "wb") as opened:
            opened.write(data)
        os.chmod(beside, 0o644)  # another user may be given the folder to read
        os.replace(beside, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
