"""MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 four-bit floats that share a power of two."""

from __future__ import annotations

import ml_dtypes
import numpy as np

BLOCK = 32  # numbers that share a scale
# Codes 0 to 7: one exponent bit more than mantissa bits; 8 to 15 are their negatives.
VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
CODES = np.concatenate([VALUES, -VALUES])
SCALE_BIAS = 127
PART = 1 << 16  # blocks decoded at once: a layer's experts would take gigabytes as float32


def decode_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers of packed blocks, exact, as bfloat16.

    Args:
      blocks: uint8[..., B, 16]. Each byte holds two codes, the first in its low half.
      scales: uint8[..., B]. Exponents of two, plus 127.

    Returns:
      bfloat16[..., B * 32]. A four-bit code has two significant bits, so bfloat16 holds the product exactly.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    if blocks.dtype != np.uint8 or scales.dtype != np.uint8 or blocks.shape != (*scales.shape, BLOCK // 2):
        raise ValueError(
            f"blocks are {blocks.dtype}{list(blocks.shape)} and scales {scales.dtype}{list(scales.shape)}: expected "
            f"uint8[..., B, {BLOCK // 2}] and uint8[..., B]"
        )
    # One table look-up per byte gives both of its numbers.
    byte = np.arange(256)
    pairs = np.stack([CODES[byte & 15], CODES[byte >> 4]], axis=1).astype(ml_dtypes.bfloat16)
    result = np.empty((*scales.shape, BLOCK), ml_dtypes.bfloat16)
    flat, flat_blocks, flat_scales = (
        result.reshape(-1, BLOCK),
        blocks.reshape(-1, BLOCK // 2),
        scales.reshape(-1),
    )
    for start in range(0, len(flat), PART):
        part = slice(start, start + PART)
        numbers = pairs[flat_blocks[part]].reshape(-1, BLOCK).astype(np.float32)
        exponents = flat_scales[part, None].astype(np.int32) - SCALE_BIAS
        flat[part] = np.ldexp(numbers, exponents)
    return result.reshape(*scales.shape[:-1], -1)
