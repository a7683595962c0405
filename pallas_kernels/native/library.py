"""Compiling, keeping and loading the library of native kernels."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax.ffi
from jaxlib import version as jaxlib_version

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
    try:
        file = cache_folder() / f"kernels-{_fingerprint()}.so"
        if not file.exists():
            compile_library(file)
        library = ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        return f"the native CPU kernels cannot be compiled: {error}"
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def cache_folder() -> Path:
    """A folder that only this user can write to: in the user's cache, or a fresh one where that cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "pallas_kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        is_own = os.name != "posix" or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
        if is_own and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="pallas_kernels-"))


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
    # Written beside and moved into place, so that no process ever loads half a file.
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch) / file.name
        native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
        command = [compiler, "-O3", native, "-fPIC", "-shared", f"-I{jax.ffi.include_dir()}"]
        done = subprocess.run(
            [*command, "-o", str(made), str(SOURCES / "kernels.c"), "-lm"],
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
            check=False,
        )
        if done.returncode:
            raise subprocess.SubprocessError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        os.replace(made, file)


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
