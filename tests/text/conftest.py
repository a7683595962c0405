"""Small tokenizers of the kinds that language models use, written as model folders."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

TEXT = [
    "the quick brown fox jumps over the lazy dog, and the dog doesn't mind.",
    "Les élèves étudient à l'école; größer, наука, 日本語のテキスト, 한국어, emoji 😀👩‍👩‍👧🇫🇷!",
    "def add(a, b):\n    return a + b\n\n\tx = add(12, 345)  # 357",
    "  leading and trailing spaces  \n and   many    inside ",
] * 3
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_folder(folder: Path, backend: Backend, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def specials() -> list[AddedToken]:
    return [AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=specials(),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("日本", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return backend


def sentencepiece(strip: int = 1) -> Backend:
    """BPE with `▁` for a space and a token for each byte, as Llama 2 (which strips) and Gemma have."""
    letters = Backend(models.BPE(unk_token="<unk>"))
    letters.normalizer = normalizers.Replace(" ", "▁")
    letters.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    letters.train_from_iterator(
        [text.encode("ascii", "ignore").decode() for text in TEXT],
        trainers.BpeTrainer(vocab_size=200, special_tokens=specials(), show_progress=False),
    )
    learned = json.loads(letters.to_str())["model"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for token in learned["vocab"]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in learned["merges"]]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepend = [normalizers.Prepend("▁")] if strip else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", strip, 0)] if strip else steps)
    backend.add_special_tokens(specials())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return backend


def metaspace() -> Backend:
    """A unigram model with the Metaspace decoder, as T5 has."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=specials(), unk_token="<unk>", show_progress=False
        ),
    )
    return backend


def wordpiece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials(), show_progress=False)
    )
    return backend


PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}
MAKERS = {
    "byte_level": (byte_level, PLAIN),
    "sentencepiece": (sentencepiece, PLAIN),
    "gemma_like": (lambda: sentencepiece(strip=0), PLAIN),
    "strips_two": (lambda: sentencepiece(strip=2), PLAIN),
    "metaspace": (metaspace, PLAIN),
    "wordpiece": (wordpiece, PLAIN | {"clean_up_tokenization_spaces": True}),
    # This class builds its own pre-tokenizer and decoder, whatever tokenizer.json says.
    "llama_class": (sentencepiece, {"tokenizer_class": "LlamaTokenizer", "legacy": False, **NAMES}),
    "extra_tokens": (
        byte_level,
        PLAIN
        | {
            "eos_token": {"__type": "AddedToken", "content": "<|end|>", "lstrip": False, "rstrip": True},
            "image_token": "<|image|>",
            "extra_special_tokens": ["<|extra|>"],
        },
    ),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write_folder(root / name, make(), config) for name, (make, config) in MAKERS.items()}
