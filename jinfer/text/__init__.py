"""Text on the host: tokens to text and back, streaming detokenization, chat templates. No jax here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinfer.text.chat import ChatTemplate
    from jinfer.text.incremental import IncrementalDetokenizer
    from jinfer.text.tokenizer import Tokenizer

# Names are imported when first used: the process that renders chat templates starts without tokenizers.
_HOMES = {
    "ChatTemplate": "jinfer.text.chat",
    "IncrementalDetokenizer": "jinfer.text.incremental",
    "Tokenizer": "jinfer.text.tokenizer",
}

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "Tokenizer"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'jinfer.text' has no attribute {name!r}")
