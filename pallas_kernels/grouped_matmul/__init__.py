"""Grouped matmul: rows sorted by group, each group multiplied by a weight of its own. The product behind experts."""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
