"""What every reader of a checkpoint format offers: named host arrays, one at a time."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np


class TensorSource(Protocol):
    """An open checkpoint. Names, shapes and dtypes are known at once; values are read when asked for.

    Every method that takes a name raises ModelError if the checkpoint has no such tensor.
    """

    def names(self) -> Collection[str]:
        """Every tensor of the checkpoint."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype, `ml_dtypes` for those that numpy lacks (bfloat16, the 8-bit floats)."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor, read-only. It may be a view of the file and is valid until `release` or `close`."""
        ...

    def release(self, name: str) -> None:
        """Says that the values of `name` are no longer looked at, so that their memory can go."""
        ...

    def close(self) -> None:
        """Gives back the files. Arrays from `read` must not be used afterwards."""
        ...
