"""A Hugging Face tokenizer without transformers: `tokenizer.json` read by the `tokenizers` library directly.

Importing transformers costs most of a second, which every start of a server would pay. Where a folder's
tokenizer class rewrites what `tokenizer.json` says (Llama 2's does), or other files name tokens that it lacks,
transformers builds the tokenizer, so that tokens are always the ones `AutoTokenizer` gives.
"""

import functools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from jinfer.errors import ModelError, RequestError
from jinfer.text.files import added_token, extra_special_tokens, is_changed_at_load, read_json, special_tokens
from jinfer.text.lengths import characters_per_token
from jinfer.text.pieces import Pieces
from jinfer.token_ids import read_token_ids

if TYPE_CHECKING:
    from jinfer.text.echo import Echo, TextOffsets

logger = logging.getLogger(__name__)

LONG_TEXT = 4096  # characters; shorter ones take less than the hop to a thread of the library's

# The classes that take tokenizer.json as it is.
_PLAIN_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}
_FORCE_CLEAN_UP = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


class Tokenizer:
    """Turns text into token ids and back, equal to transformers' `AutoTokenizer` of the same folder.

    Attributes:
      backend: the `tokenizers.Tokenizer` that does the work.
      special_tokens: name (`"bos_token"`) to text, for chat templates.
      bos_id, eos_id: the ids of those two, None where the tokenizer names none.
      eos_ids: every id that ends a generation: `eos_id` and those of `generation_config.json`.
      special_ids: the ids that `skip_special_tokens` leaves out.
      vocab_size: one more than the largest id.
      cleans_up_spaces: decoded text has the spaces before punctuation removed (WordPiece's habit).
      pieces: what each token contributes to decoded text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str] | None = None,
        eos_ids: Iterable[int] = (),
        cleans_up_spaces: bool = False,
    ) -> None:
        # Prompts are refused when too long, never cut, and batches are ragged, never padded.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.cleans_up_spaces = cleans_up_spaces
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.added_tokens = {token.content: i for i, token in added.items()}
        self.vocab_size = max(backend.get_vocab_size(), max(added, default=-1) + 1)
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        self.eos_ids = frozenset(eos_ids) | ({self.eos_id} if self.eos_id is not None else set())
        self.pieces = Pieces(backend)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a model folder.

        Raises:
          ModelError: there is none, it is broken, or it has no fast version.
        """
        folder = Path(path)
        config = read_json(folder / "tokenizer_config.json")
        file = folder / "tokenizer.json"
        is_plain = not config or config.get("tokenizer_class") in _PLAIN_CLASSES
        if file.is_file() and is_plain and not is_changed_at_load(folder, config):
            backend, named = _read_plainly(file, config)
        else:
            backend, named = _build_with_transformers(folder, config)
        return cls(
            backend,
            named,
            eos_ids=_generation_eos_ids(folder, backend),
            cleans_up_spaces=_cleans_up(backend, config),
        )

    def encode(
        self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None
    ) -> list[int]:
        """The token ids of a text; `add_special_tokens` adds what the tokenizer's template adds (mostly BOS).

        A long text is encoded outside Python's lock, so other threads go on.

        Raises:
          RequestError: the text holds half of a surrogate pair, which no encoding can express; or it has more than
            `max_tokens` tokens. Where its length alone shows that, it is refused without being encoded.
        """
        if max_tokens is not None:
            self.refuse_long(text, max_tokens)
        try:
            if len(text) < LONG_TEXT:
                encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
            else:
                # `encode` holds Python's lock throughout, the methods for batches do not.
                (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:
            _refuse_surrogates(text)
            raise
        if max_tokens is not None and len(encoding) > max_tokens:
            raise RequestError(
                f"the text has {len(encoding)} tokens, expected at most {max_tokens}: shorten it",
                param="prompt",
            )
        return encoding.ids

    @functools.cached_property
    def characters_per_token(self) -> int | None:
        """The most characters of a text that one token can stand for; None where there is no limit."""
        return characters_per_token(self.backend)

    def refuse_long(self, text: str, max_tokens: int) -> None:
        """Raises RequestError for a text whose length alone shows that it has more than `max_tokens` tokens."""
        if len(text) <= max(max_tokens, LONG_TEXT) or self.characters_per_token is None:
            return
        if len(text) > max_tokens * self.characters_per_token:
            raise RequestError(
                f"the text has {len(text)} characters and its tokens have at most {self.characters_per_token} each, so "
                f"it has more than {max_tokens} tokens: shorten it",
                param="prompt",
            )

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts at once, on several threads."""
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError:
            for text in texts:
                _refuse_surrogates(text)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids that the vocabulary does not have contribute nothing."""
        if len(ids) < LONG_TEXT:
            text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        else:  # outside Python's lock
            (text,) = self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return clean_up(text) if self.cleans_up_spaces else text

    def echo(self, prompt_ids: Sequence[int], skip_special_tokens: bool = True) -> "Echo":
        """A prompt's part in the text of prompt and output."""
        from jinfer.text.echo import Echo

        return Echo(self, prompt_ids, skip_special_tokens)

    def text_offsets(self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> "TextOffsets":
        """Finds where each token of a text begins that continues `prompt_ids`."""
        from jinfer.text.echo import TextOffsets

        return TextOffsets(self, prompt_ids, skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token (`"Ġhello"`), None outside the vocabulary."""
        return self.backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by the vocabulary's own spelling."""
        return self.backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token contributes in the middle of a text; they may be a part of a character."""
        return self.pieces.bytes_of(token_id)

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with the replacement character for a part of a character."""
        return self.pieces.bytes_of(token_id).decode("utf-8", "replace")

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


def clean_up(text: str) -> str:
    """Removes the spaces that WordPiece decoding leaves before punctuation and English contractions."""
    for spaced in (" .", " ?", " !", " ,"):
        text = text.replace(spaced, spaced[1:])
    text = text.replace(" ' ", "'")
    for spaced in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced[1:])
    return text


def _refuse_surrogates(text: str) -> None:
    """Says why the library took a text for no text at all."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has half of a surrogate pair (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}, which is not valid Unicode: remove it, or send the character whole"
        ) from error


def _read_plainly(file: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """tokenizer.json as it is, with the special tokens that only tokenizer_config.json names."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
        raise ModelError(f"{file} is not a tokenizer ({error}): download the model again") from error
    named = special_tokens(file.parent, config)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    tokens = [added_token(declared[key], special=False) for key in sorted(declared, key=int)]
    specials = {token.content for token in named.values()}
    for token in tokens:
        token.special = token.special or token.content in specials
    missing = []
    for token in [*tokens, *named.values(), *extra_special_tokens(config)]:
        if token.content not in known:
            known.add(token.content)
            missing.append(token)
    backend.add_tokens(missing)
    if config.get("split_special_tokens"):
        backend.encode_special_tokens = True
    return backend, {name: token.content for name, token in named.items()}


def _build_with_transformers(
    folder: Path, config: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    from transformers import AutoTokenizer

    try:
        built = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        if (folder / "tokenizer.json").is_file():
            logger.warning("transformers cannot build the tokenizer in %s: %s", folder, error)
            return _read_plainly(folder / "tokenizer.json", config)
        raise ModelError(
            f"no usable tokenizer in {folder} ({error}): jinfer needs tokenizer.json. Where only a "
            "sentencepiece or tiktoken file exists, `pip install sentencepiece tiktoken protobuf`, load it "
            "once with transformers' AutoTokenizer and save it there with save_pretrained"
        ) from error
    backend = getattr(built, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ModelError(
            f"the tokenizer of {folder} ({type(built).__name__}) has no fast version, and jinfer runs no "
            "Python tokenizers: convert it to tokenizer.json"
        )
    _refuse_no_vocabulary(folder, backend)
    return backend, {name: str(token) for name, token in built.special_tokens_map.items()}


def _refuse_no_vocabulary(folder: Path, backend: tokenizers.Tokenizer) -> None:
    """transformers makes a tokenizer of a few special tokens where a class finds no vocabulary file of its own."""
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    if not backend.get_vocab(with_added_tokens=False).keys() - special - {"▁"}:
        raise ModelError(
            f"no usable tokenizer in {folder}: it has no vocabulary (tokenizer.json, or tokenizer.model, or vocab.json "
            "with merges.txt), only special tokens. Copy tokenizer.json there from where the weights come from, or name "
            "the folder or hub id of the model's own tokenizer by --tokenizer"
        )


def _generation_eos_ids(folder: Path, backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    file = folder / "generation_config.json"
    size = max(backend.get_vocab_size(), max(backend.get_added_tokens_decoder(), default=-1) + 1)
    return read_token_ids(read_json(file).get("eos_token_id"), size, str(file))


def _cleans_up(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> bool:
    if not config.get("clean_up_tokenization_spaces"):
        return False
    # Cleaning eats real spaces of a BPE model's text, so transformers does it there only when forced to.
    return not isinstance(backend.model, tokenizers.models.BPE) or bool(config.get(_FORCE_CLEAN_UP))
