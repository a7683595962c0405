"""Dense attention over whole sequences, for scoring and embedding without a KV cache."""

from pallas_kernels.flash_attention.api import attend
from pallas_kernels.flash_attention.spec import AttentionSpec

__all__ = ["AttentionSpec", "attend"]
