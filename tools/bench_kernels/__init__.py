"""Times the kernels on the accelerator at hand, against what it can do and against jax's own."""
