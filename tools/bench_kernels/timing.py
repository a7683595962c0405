"""Timing one step of a program on a device, with the host left out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

SHORTEST = 0.05  # seconds of device work in a measured run: a thousand times what a dispatch takes
REPEATS = 7


def seconds_per_step(
    step: Callable[[Any, Any], Any],
    carry: Any,
    *,
    constants: Any = None,
    shortest: float = SHORTEST,
    repeats: int = REPEATS,
) -> float:
    """The time of `carry = step(carry, constants)` on the device.

    The steps run in a loop on the device, each on what the one before it gave, so none can be dropped, moved out of
    the loop or overlapped with another. A run of n steps is taken from one of 2 n: the difference is n steps without
    dispatch, transfers and the loop's start. The median of `repeats` such differences is returned.

    Args:
      step: (carry, constants) -> carry of the same shapes.
      constants: arrays that every step reads; kept out of the loop's state, so nothing copies them.
      shortest: seconds that n steps should take at least.
    """

    @jax.jit
    def run(carry, constants, count):
        return lax.fori_loop(0, count, lambda _, state: step(state, constants), carry)

    def timed(count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(carry, constants, count))
        return time.perf_counter() - start

    timed(1)  # compiles
    count = 1
    while (once := timed(count)) < shortest and count < 1 << 20:
        count = max(count * 2, int(count * shortest / max(once, 1e-6)))
    differences = [(timed(2 * count) - timed(count)) / count for _ in range(repeats)]
    return max(statistics.median(differences), 0.0)


def copy_bandwidth(num_bytes: int = 1 << 30) -> float:
    """Bytes per second that an elementwise copy reads and writes: the most that a kernel here can stream."""
    import jax.numpy as jnp

    x = jnp.zeros((num_bytes // 4,), jnp.float32)
    return 2 * x.nbytes / seconds_per_step(lambda x, _: x + 1.0, x)


def matmul_rate(size: int = 8192) -> float:
    """Floating-point operations per second of a large square bf16 matmul."""
    import jax.numpy as jnp

    # Random numbers: a chip that multiplies zeros draws less power and clocks higher. The scale keeps them finite.
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (size, size), jnp.bfloat16)
    w = jax.random.normal(keys[1], (size, size), jnp.bfloat16) * jnp.asarray(size**-0.5, jnp.bfloat16)
    return 2 * size**3 / seconds_per_step(lambda x, w: x @ w, x, constants=w)
