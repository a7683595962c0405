"""GPU interpret mode for tests: with race detection, and each kernel compiled once."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.core
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode

_compiled: dict[int, tuple[Any, Any]] = {}  # the jaxpr is kept, so that its id stays its own
_lock = threading.Lock()


def _run_jaxpr(jaxpr, consts, *args) -> None:
    """jax compiles an interpreted kernel anew for every warpgroup of every block; here once."""
    with _lock:
        if id(jaxpr) not in _compiled:

            def run(consts, *args):
                jax.core.eval_jaxpr(jaxpr, consts, *args)

            _compiled[id(jaxpr)] = jaxpr, jax.jit(run).lower(consts, *args).compile()
    _compiled[id(jaxpr)][1](consts, *args)


@contextlib.contextmanager
def gpu_interpreted() -> Iterator[None]:
    """Interprets Mosaic GPU kernels inside, and fails at its end when a race was found.

    Needs as many CPU devices as a block has warpgroups, at least: XLA has a thread per device, and each warpgroup that
    waits for a barrier holds one.
    """
    known = thread_map._run_jaxpr
    thread_map._run_jaxpr = _run_jaxpr
    try:
        with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
            yield
        assert not gpu_callbacks.get_races().races_found
    finally:
        thread_map._run_jaxpr = known
        gpu_callbacks.reset_gpu_interpret_mode_state()
