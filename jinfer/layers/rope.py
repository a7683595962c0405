"""Rotary position embedding (RoFormer, arXiv 2104.09864) and its scalings to longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Rotary:
    """What the angles are made from.

    kind: default, linear (angles divided by `factor`), dynamic (the base grows with the length beyond `original`),
    llama3 (low frequencies divided, a smooth band between), yarn (arXiv 2309.00071).
    """

    dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    original: int = 0  # positions the model was first trained on
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def depends_on_length(self) -> bool:
        return self.kind == "dynamic"

    @property
    def magnitude(self) -> float:
        """Factor of cos and sin."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _yarn_scale(self.factor, self.mscale) / _yarn_scale(self.factor, self.mscale_all_dim)
        return _yarn_scale(self.factor, 1.0)

    def frequencies(self) -> np.ndarray:
        """float32[dim / 2]: radians per position (for dynamic: up to the original length)."""
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        base = (1.0 / np.float32(self.theta) ** exponent).astype(np.float32)
        if self.kind == "linear":
            return (base / np.float32(self.factor)).astype(np.float32)
        if self.kind == "llama3":
            return self._llama3(base)
        if self.kind == "yarn":
            return self._yarn(base)
        return base

    def _llama3(self, base: np.ndarray) -> np.ndarray:
        wavelength = 2 * math.pi / base
        low, high = self.original / self.low_freq_factor, self.original / self.high_freq_factor
        smooth = (self.original / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - smooth) * base / self.factor + smooth * base
        scaled = np.where(wavelength > low, base / self.factor, base)
        return np.where((wavelength <= low) & (wavelength >= high), between, scaled).astype(np.float32)

    def _yarn(self, base: np.ndarray) -> np.ndarray:
        def dimension_of(turns: float) -> float:
            # The dimension whose angle makes that many turns over the original length.
            return self.dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(self.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        keep = 1 - ramp
        return (base / self.factor * (1 - keep) + base * keep).astype(np.float32)

    def tables(
        self, positions: Int[Array, "T"], lengths: Int[Array, "T"] | None = None
    ) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
        """(cos, sin), float32[T, dim / 2].

        lengths: for `dynamic`, the sequence length that each token's angles are for: the prompt's for its tokens, and
        position + 1 for a generated one. Each token depends on its own request alone, however it is chunked.
        """
        where = positions.astype(jnp.float32)[:, None]
        if self.depends_on_length and lengths is not None:
            length = jnp.maximum(lengths, self.original).astype(jnp.float32)
            growth = self.factor * length / self.original - (self.factor - 1)
            theta = self.theta * growth ** (self.dim / (self.dim - 2))
            exponent = jnp.arange(0, self.dim, 2, dtype=jnp.float32) / self.dim
            angles = where / theta[:, None] ** exponent
        else:
            angles = where * jnp.asarray(self.frequencies())
        return jnp.cos(angles) * self.magnitude, jnp.sin(angles) * self.magnitude


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotate(
    x: Float[Array, "T N D"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "T N D"]:
    """Rotates the pairs (x[i], x[i + D/2]) by each token's angles; computed in float32, returned in x's dtype."""
    half = x.shape[-1] // 2
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    c, s = cos[:, None], sin[:, None]
    return jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1).astype(x.dtype)
