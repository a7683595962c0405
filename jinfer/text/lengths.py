"""How much text one token can stand for. A text with more characters than that times the tokens a model takes need not
be tokenized to be refused."""

import json
from collections.abc import Iterator
from typing import Any

import tokenizers

# The longest canonical decomposition of a character has four, so composing shortens a text to a quarter at most.
_NORMALIZERS = {"Prepend": 1, "Lowercase": 1, "NFD": 1, "NFKD": 1, "ByteLevel": 1, "NFC": 4, "NFKC": 4}
_KEEPING_PRE_TOKENIZERS = {"ByteLevel", "Digits", "Metaspace"}
_SPLITTING_PRE_TOKENIZERS = {"Split", "Punctuation"}


def characters_per_token(backend: tokenizers.Tokenizer) -> int | None:
    """The most characters of a text that one token can stand for; None where there is no limit.

    There is none where something may swallow text of any length: a normalizer that strips or collapses spaces, a
    pre-tokenizer that drops them, unknown characters that become one token together, an added token that takes in the
    spaces around it.
    """
    shrinking = _shrinking(backend.normalizer)
    added = backend.get_added_tokens_decoder().values()
    if shrinking is None or any(token.lstrip or token.rstrip for token in added):
        return None
    vocabulary = backend.get_vocab()
    if not (_keeps_all(backend.pre_tokenizer) and _knows_all(backend, vocabulary)):
        return None
    return shrinking * max(map(len, vocabulary), default=1)


def _parts(component: Any, name: str) -> Iterator[dict[str, Any]]:
    """The members of a normalizer or pre-tokenizer; itself if it is no sequence of others."""
    if component is None:
        return
    todo = [json.loads(component.__getstate__())]
    while todo:
        part = todo.pop()
        if part["type"] == "Sequence":
            todo += part[name]
        else:
            yield part


def _shrinking(normalizer: Any) -> int | None:
    """By which factor a normalizer may shorten a text; None if by any."""
    factor = 1
    for part in _parts(normalizer, "normalizers"):
        if part["type"] == "Replace":
            pattern = part["pattern"].get("String")
            if pattern is None or len(part["content"]) < len(pattern):
                return None
        elif part["type"] in _NORMALIZERS:
            factor *= _NORMALIZERS[part["type"]]
        else:
            return None
    return factor


def _keeps_all(pre_tokenizer: Any) -> bool:
    for part in _parts(pre_tokenizer, "pretokenizers"):
        keeps = part["type"] in _KEEPING_PRE_TOKENIZERS
        splits = part["type"] in _SPLITTING_PRE_TOKENIZERS and part["behavior"] != "Removed"
        if not (keeps or splits):
            return False
    return True


def _knows_all(backend: tokenizers.Tokenizer, vocabulary: dict[str, int]) -> bool:
    """Whether every character becomes at least one token: bytes that are all there, or an unknown token of its own."""
    model = backend.model
    if not isinstance(model, tokenizers.models.BPE):
        return False
    kinds = [part["type"] for part in _parts(backend.pre_tokenizer, "pretokenizers")]
    kinds += [part["type"] for part in _parts(backend.normalizer, "normalizers")]
    if "ByteLevel" in kinds:
        return all(character in vocabulary for character in tokenizers.pre_tokenizers.ByteLevel.alphabet())
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return True
    return model.unk_token is not None and not model.fuse_unk
