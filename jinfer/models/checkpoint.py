"""What a checkpoint's tensors say beside config.json: under which names the decoder is there, and whose its head is."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from jinfer.models.hf_config import ModelConfig
from jinfer.weights.source import TensorSource

logger = logging.getLogger(__name__)

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXT = "language_model."  # in the names of a decoder that is one part of several
BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class Naming:
    """What a checkpoint has in place of the usual prefixes `model.` and `lm_head.`.

    bare: it was saved from a class without a head.
    """

    base: str = "model."
    head: str = "lm_head."
    bare: bool = False

    def stored(self, name: str) -> str:
        """The checkpoint's name of a tensor, by its usual one."""
        for usual, here in (("model.", self.base), ("lm_head.", self.head)):
            if name.startswith(usual):
                return here + name.removeprefix(usual)
        return name

    def usual(self, name: str) -> str:
        """The usual name of a tensor, by the checkpoint's; names under other prefixes stay as they are."""
        for usual, here in (("lm_head.", self.head), ("model.", self.base)):
            if name.startswith(here):
                return usual + name.removeprefix(here)
        return name


# No name begins as two of them say.
NAMINGS = (
    Naming(),
    Naming("", bare=True),
    Naming("model.language_model."),
    Naming("language_model.model.", "language_model.lm_head."),
    Naming("language_model.", bare=True),
)


def naming_of(names: Collection[str], first_layers: str = "model.layers.") -> Naming:
    """The prefixes of a checkpoint with these tensors. first_layers: how usual names of layers begin."""
    for naming in NAMINGS:
        start = naming.stored(first_layers)
        if any(name.startswith(start) for name in names):
            return naming
    return Naming()


def with_head_of(config: ModelConfig, naming: Naming, source: TensorSource) -> ModelConfig:
    """The config with the head that the checkpoint has.

    A head that is there and differs from the embeddings is used, whatever config.json says. A checkpoint of a class
    without a head has none, unless config.json ties it.
    """
    names = source.names()
    head, table = naming.stored(HEAD), naming.stored(TABLE)
    if config.tie_word_embeddings:
        if head not in names or table not in names or _are_equal(source, head, table):
            return config
        logger.warning(
            "config.json ties the head to the embeddings, and the checkpoint's %s differs from them: the head is used "
            "as it is; set tie_word_embeddings to false in config.json",
            head,
        )
        return replace(config, tie_word_embeddings=False)
    headless = naming.bare or any(name.endswith("Model") for name in config.architectures)
    if head in names or not headless:
        return config
    logger.warning("the checkpoint has no %s: the model embeds, and does not generate or score", head)
    return with_saved_head(config, "none")


def head_of(config: ModelConfig) -> str:
    """What `with_saved_head` makes the same head of: "own", "tied" or "none"."""
    return "none" if not config.has_head else "tied" if config.tie_word_embeddings else "own"


def with_saved_head(config: ModelConfig, head: str | None) -> ModelConfig:
    """The config with the head that a model was saved with, by `head_of`; None: as config.json says."""
    if head == "none":
        return replace(config, tie_word_embeddings=False, has_head=False, head_bias=False)
    return config if head is None else replace(config, tie_word_embeddings=head == "tied")


def _are_equal(source: TensorSource, one: str, other: str) -> bool:
    """True if two tensors hold the same values; read in blocks, up to the first that differs."""
    if source.shape(one) != source.shape(other):
        return False
    try:
        a, b = source.read(one), source.read(other)
        rows = max(1, BLOCK_BYTES // max(1, a[:1].nbytes))
        for start in range(0, len(a), rows):
            x, y = a[start : start + rows], b[start : start + rows]
            if not np.array_equal(x.astype(np.float32), y.astype(np.float32)):
                return False
        return True
    finally:
        source.release(one)
        source.release(other)
