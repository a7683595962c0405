"""Ragged paged attention: decode rows and prompt chunks in one call, over one page pool for all layers."""

from pallas_kernels.paged_attention.api import (
    StepPlan,
    attend,
    kv_partition_spec,
    kv_shape,
    prepare,
    write_kv,
)
from pallas_kernels.paged_attention.batch import RaggedBatch

__all__ = ["RaggedBatch", "StepPlan", "attend", "kv_partition_spec", "kv_shape", "prepare", "write_kv"]
