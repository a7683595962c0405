"""Text on the host: tokens to text and back, streaming detokenization, chat templates. No jax here."""

from jinfer.text.chat import ChatTemplate
from jinfer.text.incremental import IncrementalDetokenizer
from jinfer.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "Tokenizer"]
