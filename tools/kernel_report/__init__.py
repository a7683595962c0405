"""The static cost of kernels, from the compiler's own output."""
