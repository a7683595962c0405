"""What must be said to jax before it starts a backend, and the persistent compile cache."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jinfer import compile_cache
from jinfer.config import EngineConfig
from jinfer.errors import ConfigError
from pallas_kernels import userfiles

logger = logging.getLogger(__name__)

GOOGLE_PCI_VENDOR = "0x1ae0"


def _setting(name: str) -> Any:
    return getattr(jax.config, name)  # which settings there are is known only at run time


def prepare_platform(config: EngineConfig) -> None:
    """Asks for enough virtual CPU devices where the CPU is the backend, and turns the compile cache on.

    Both only where the caller has not: settings made before stay as they are.
    """
    _skip_absent_tpu()
    if config.num_devices > 1:
        _ask_for_cpu_devices(config.num_devices)
    if _setting("jax_compilation_cache_dir") is None and config.compilation_cache_dir != "off":
        folder = _compile_cache_folder(config.compilation_cache_dir)
        if folder is None:
            return
        jax.config.update("jax_compilation_cache_dir", folder)
        # Every program of a step is worth keeping: a start compiles a dozen.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        if "://" not in folder:
            compile_cache.install(Path(folder))


def _compile_cache_folder(given: str | None) -> str | None:
    """Where compiled programs are kept; None, with a line of log, where they cannot be."""
    if given is None:
        folder = userfiles.cache_folder("jinfer/programs")
        if folder is None:
            logger.warning(
                "no compile cache: neither the user's cache nor the folder for temporary files can be written, so "
                "each start compiles again; name a folder with compilation_cache_dir"
            )
        return None if folder is None else str(folder)
    if "://" in given:
        return given  # jax reads such stores by itself
    try:
        return str(userfiles.make_folder(Path(given)))
    except OSError as error:
        logger.warning("no compile cache, each start compiles again: %s", error)
        return None


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Within it the strict settings that a caller may have made for code of its own do not count: ranks are promoted
    where numpy would, and arrays of the host go to the device as arguments."""
    with jax.numpy_rank_promotion("allow"), jax.transfer_guard("allow"):
        yield


def refuse_disabled_jit() -> None:
    """Raises ConfigError if jax is set not to compile."""
    if _setting("jax_disable_jit"):
        raise ConfigError(
            "jax_disable_jit is set, and the engine runs compiled programs only: unset it, or leave its context"
        )


def _skip_absent_tpu() -> None:
    """Where libtpu is installed and no TPU is there, jax would look for one at length and warn loudly."""
    if _setting("jax_platforms"):
        return
    if importlib.util.find_spec("libtpu") is None or _has_tpu() or Path("/dev/nvidiactl").exists():
        return
    with contextlib.suppress(RuntimeError):  # a backend runs already
        jax.config.update("jax_platforms", "cpu")


def _has_tpu() -> bool:
    if any(Path("/dev").glob("accel*")):
        return True
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        try:
            if vendor.read_text().strip() == GOOGLE_PCI_VENDOR:
                return True
        except OSError:
            continue
    return False


def _ask_for_cpu_devices(count: int) -> None:
    try:
        if _setting("jax_num_cpu_devices") < count and "host_platform_device_count" not in os.environ.get(
            "XLA_FLAGS", ""
        ):
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        # The backend runs already; make_mesh says so if its devices are too few.
        logger.debug("jax has started: the number of CPU devices stays as it is")
