"""The one reader of token ids that a model's files state."""

from __future__ import annotations

import logging
from typing import Any

from jinfer.errors import ModelError, shown

logger = logging.getLogger(__name__)


def read_token_ids(value: Any, vocab_size: int, where: str, key: str = "eos_token_id") -> tuple[int, ...]:
    """One token id or a list of them, each once; () for null.

    Integers outside of [0, vocab_size) are never sampled, so they are left out, with a warning.

    Raises:
      ModelError: something else than integers.
    """
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in found):
        raise ModelError(f"{where}: {key} is {shown(value)}, expected an integer or a list of them")
    ids = tuple(i for i in dict.fromkeys(found) if 0 <= i < vocab_size)
    if left_out := [shown(i) for i in dict.fromkeys(found) if i not in ids]:
        logger.warning(
            "%s: %s has %s, outside of the vocabulary of %d tokens: left out",
            where,
            key,
            ", ".join(left_out)[:120],
            vocab_size,
        )
    return ids
