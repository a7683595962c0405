"""Kernels for the CPU in C, compiled once for the machine they run on.

XLA's CPU backend multiplies a few rows by a whole weight matrix at about two thirds of memory speed, and runs attention
over pages as loops of small operations. These kernels read weights and pages once. `load` compiles the sources with the
system's C compiler (about two seconds, once per machine, kept in the user's cache) and registers them with XLA; where
there is no compiler it says so and callers stay with XLA.
"""

from pallas_kernels.native.library import load
from pallas_kernels.native.rows import MAX_ROWS, matmul, rms_norm

__all__ = ["MAX_ROWS", "load", "matmul", "rms_norm"]
