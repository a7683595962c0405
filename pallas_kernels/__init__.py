"""Kernels for large language models in JAX, usable alone: one folder per op, one contract per folder.

Every op has a plain jnp reference (`implementation="reference"`), a path that XLA compiles well everywhere (`"xla"`) and
kernels for the accelerators that have one. `implementation="auto"` picks by platform and shape.
"""

from pallas_kernels.dispatch import ImplementationError

__all__ = ["ImplementationError"]
