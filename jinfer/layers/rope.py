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
    llama3 (low frequencies divided, a smooth band between), yarn (arXiv 2309.00071), longrope (arXiv 2402.13753: each
    frequency divided by its own factor, by another one where the sequence is longer than `original`).
    dim: leading numbers of each head that are rotated, even; the others stay.
    interleaved: pairs are neighbours (x[2i], x[2i + 1]); else (x[i], x[i + dim/2]).
    """

    dim: int
    theta: float
    kind: str = "default"
    interleaved: bool = False
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
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """True if angles change where a sequence is longer than `original`."""
        return self.kind in ("dynamic", "longrope")

    @property
    def magnitude(self) -> float:
        """Factor of cos and sin."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original)) if self.factor > 1 else 1.0
        if self.mscale and self.mscale_all_dim:
            return _yarn_scale(self.factor, self.mscale) / _yarn_scale(self.factor, self.mscale_all_dim)
        return _yarn_scale(self.factor, 1.0)

    def frequencies(self, *, beyond: bool = False) -> np.ndarray:
        """float32[dim / 2]: radians per position; for dynamic and longrope, of sequences up to the original length.

        beyond: for longrope, those of longer sequences.
        """
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        base = (1.0 / np.float32(self.theta) ** exponent).astype(np.float32)
        if self.kind == "linear":
            return (base / np.float32(self.factor)).astype(np.float32)
        if self.kind == "llama3":
            return self._llama3(base)
        if self.kind == "yarn":
            return self._yarn(base)
        if self.kind == "longrope":
            factors = np.asarray(self.long_factors if beyond else self.short_factors, np.float32)
            return (1.0 / (factors * np.float32(self.theta) ** exponent)).astype(np.float32)
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

        lengths: where angles depend on it, the sequence length that each token's angles are for: the prompt's for its
        tokens, and position + 1 for a generated one. Each token depends on its own request alone, however chunked.
        For longrope a sequence that has grown beyond `original` is computed anew, and all its tokens are the prompt's.
        """
        where = positions.astype(jnp.float32)[:, None]
        if self.kind == "longrope" and lengths is not None:
            beyond = (lengths > self.original)[:, None]
            angles = where * jnp.where(beyond, self.frequencies(beyond=True), self.frequencies())
        elif self.kind == "dynamic" and lengths is not None:
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
    x: Float[Array, "T N D"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    *,
    interleaved: bool = False,
) -> Float[Array, "T N D"]:
    """Rotates the first 2 * half numbers of each head by the token's angles; in float32, returned in x's dtype.

    Pairs are (x[i], x[i + half]), or (x[2i], x[2i + 1]) where interleaved.
    """
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    c, s = cos[:, None], sin[:, None]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        result = jnp.stack([a * c - b * s, b * c + a * s], axis=-1).reshape(turned.shape)
    else:
        a, b = turned[..., :half], turned[..., half:]
        result = jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1)
    result = result.astype(x.dtype)
    return jnp.concatenate([result, rest], axis=-1) if rest.shape[-1] else result
