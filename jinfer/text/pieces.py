"""What one token contributes to decoded text, for the decoders that language models use.

`tokenizers` decodes whole sequences. Streaming needs the part of each token, and what it may depend on:

- *byte-level* (GPT-2, Llama 3, Qwen): a token is bytes; the text is all bytes together, read as UTF-8.
- *metaspace* (sentencepiece: Llama 2, Mistral, Gemma): a token is text with `▁` for a space, or a single byte
  `<0xE2>`; the beginning of the text may lose a space.
- *other* (WordPiece, CTC, ...): known only to the library.
"""

import enum
import json
import re
from typing import Any

import tokenizers

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Kind(enum.Enum):
    BYTE_LEVEL = enum.auto()
    METASPACE = enum.auto()
    OTHER = enum.auto()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others as U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class Pieces:
    """Per-token text of one tokenizer, computed when first asked for.

    Attributes:
      kind: how tokens become text.
      strips: metaspace only; how many spaces the beginning of a text loses.
      bares_first: metaspace only; the first token of a text loses every `▁`.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self._metaspace: dict[int, str | int | None] = {}
        self._rules: list[dict[str, Any]] = []
        self.strips = 0
        self.bares_first = False
        self.kind = self._recognize()

    def _recognize(self) -> Kind:
        decoder = self._backend.decoder
        if decoder is None:
            return Kind.OTHER
        spec = json.loads(decoder.__getstate__())
        rules = spec["decoders"] if spec["type"] == "Sequence" else [spec]
        names = [rule["type"] for rule in rules]
        if names == ["ByteLevel"]:
            return Kind.BYTE_LEVEL
        if names == ["Metaspace"]:
            self._rules = [{"from": rules[0]["replacement"], "to": " "}]
            self.bares_first = rules[0].get("prepend_scheme") != "never"
            return Kind.METASPACE
        # Replace..., ByteFallback, Fuse, and perhaps a Strip of leading spaces once all is fused.
        if "ByteFallback" not in names:
            return Kind.OTHER
        split = names.index("ByteFallback")
        replaces, rest = rules[:split], rules[split:]
        if any(rule["type"] != "Replace" or "String" not in rule["pattern"] for rule in replaces):
            return Kind.OTHER
        if names[split:] not in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
            return Kind.OTHER
        if len(rest) == 3:
            if rest[2]["content"] != " " or rest[2]["stop"]:
                return Kind.OTHER
            self.strips = rest[2]["start"]
        self._rules = [{"from": rule["pattern"]["String"], "to": rule["content"]} for rule in replaces]
        self._rules.append({"bytes": True})
        return Kind.METASPACE

    def byte_level(self, token_id: int) -> bytes:
        """The bytes of a byte-level token; empty outside the vocabulary."""
        piece = self._bytes.get(token_id)
        if piece is None:
            token = self._backend.id_to_token(token_id) or ""
            try:
                piece = bytes([_ALPHABET[character] for character in token])
            except KeyError:  # an added token with characters outside the alphabet stands for itself
                piece = token.encode()
            self._bytes[token_id] = piece
        return piece

    def metaspace(self, token_id: int) -> str | int | None:
        """The text of a metaspace token, or the value of a byte token; None outside the vocabulary."""
        try:
            return self._metaspace[token_id]
        except KeyError:
            piece = self._metaspace[token_id] = self._metaspace_piece(token_id)
            return piece

    def _metaspace_piece(self, token_id: int) -> str | int | None:
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return None
        for rule in self._rules:
            if "from" in rule:
                piece = piece.replace(rule["from"], rule["to"])
            elif _BYTE.fullmatch(piece):
                return int(piece[3:5], 16)
        return piece

    def first_metaspace(self, token_id: int) -> str | int | None:
        """`metaspace` for the first token of a text."""
        if not self.bares_first:
            return self.metaspace(token_id)
        token = self._backend.id_to_token(token_id)
        return None if token is None else token.replace(self._rules[0]["from"], "")

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes a token contributes in the middle of a text, of any kind of tokenizer."""
        if self.kind is Kind.BYTE_LEVEL:
            return self.byte_level(token_id)
        if self.kind is Kind.METASPACE:
            piece = self.metaspace(token_id)
            return bytes([piece]) if isinstance(piece, int) else (piece or "").encode()
        return self._backend.decode([token_id], skip_special_tokens=False).encode()
