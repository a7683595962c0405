"""What is static about one call: the shapes and the kind of attention.

Dimension letters: B sequences, T tokens of each, H query heads, K KV heads, G = H // K, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class AttentionSpec:
    """Hashable, so it is one static argument of jit.

    Attributes:
      dtype: of q, k and v.
      window: a query at i sees keys j with i - j < window, and without `causal` also j - i < window. None: all.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap). None: as they are.
      has_sinks: each query head has one more logit, without a value.
    """

    batch: int
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    scale: float
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads
