"""Compiling, keeping and loading the library of native kernels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax.ffi
from jaxlib import version as jaxlib_version

from pallas_kernels import userfiles

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
TARGETS = (
    "pallas_kernels_matmul",
    "pallas_kernels_attend",
    "pallas_kernels_write_kv",
    "pallas_kernels_rms_norm",
)
COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS = 120


@functools.cache
def load() -> str | None:
    """Makes the kernels known to XLA, compiling them first where this machine has not yet.

    Returns:
      None when they can be called, else a sentence that says why not.
    """
    folder = userfiles.cache_folder("pallas_kernels")
    key = _fingerprint()
    try:
        library = _kept(folder, key) or _compiled(folder, key)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the native CPU kernels cannot be compiled: {error}"
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def _kept(folder: Path | None, key: str) -> ctypes.CDLL | None:
    """The library that an earlier process compiled. Its name has the hash of its bytes; one that differs, or that the
    system cannot load, is deleted."""
    for file in sorted(folder.glob(f"kernels-{key}-*.so")) if folder is not None else ():
        try:
            if file.name != _name(key, userfiles.read(file)):
                raise OSError("its bytes have changed since it was written")
            return ctypes.CDLL(str(file))
        except OSError as error:
            logger.warning("%s is compiled again: %s", file, error)
            with contextlib.suppress(OSError):
                file.unlink()
    return None


def _compiled(folder: Path | None, key: str) -> ctypes.CDLL:
    """The library, compiled now and kept for later if there is a folder that takes it."""
    failure: Exception | None = None
    for place in (
        (None,) if folder is None else (folder, None)
    ):  # None: the system's, where the cache's disk is full
        try:
            with tempfile.TemporaryDirectory(prefix="kernels-", dir=place) as scratch:
                made = Path(scratch) / "kernels.so"
                compile_library(made)
                if place is not None:
                    # Moved into place whole, so that no process ever loads half a file.
                    kept = place / _name(key, made.read_bytes())
                    os.replace(made, kept)
                    made = kept
                return ctypes.CDLL(str(made))  # stays mapped when the file is gone
        except (OSError, subprocess.SubprocessError) as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _name(key: str, data: bytes) -> str:
    return f"kernels-{key}-{hashlib.sha256(data).hexdigest()[:32]}.so"


def compile_library(file: Path) -> None:
    """Compiles the sources into `file`, for the processor at hand.

    Raises:
      OSError: no C compiler is found, or the folder cannot be written.
      subprocess.SubprocessError: the compiler fails or takes too long.
    """
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise FileNotFoundError(
            f"no C compiler found (looked for {', '.join(COMPILERS)}): install gcc or clang"
        )
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [compiler, "-O3", native, "-fPIC", "-shared", f"-I{jax.ffi.include_dir()}"]
    done = subprocess.run(
        [*command, "-o", str(file), str(SOURCES / "kernels.c"), "-lm"],
        capture_output=True,
        text=True,
        timeout=COMPILE_SECONDS,
        check=False,
    )
    if done.returncode:
        raise subprocess.SubprocessError(f"{compiler} failed: {done.stderr.strip()[-500:]}")


def _fingerprint() -> str:
    """What the compiled file depends on: the sources, XLA's interface and the processor's instructions."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(
        f"{jaxlib_version.__version__} {platform.machine()} {platform.system()} {_instructions()}".encode()
    )
    return digest.hexdigest()[:20]


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
