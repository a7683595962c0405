"""Added tokens of every kind, wherever a folder declares them, cut text as transformers cuts it; and tokenizers that
exist in Python only are refused."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jinfer.errors import ModelError
from jinfer.text.incremental import IncrementalDetokenizer
from jinfer.text.tokenizer import Tokenizer

FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
# A word for each combination of flags: A00000 to A11111, and one that is part of another.
TOKENS = {
    "A" + "".join(str(int(on)) for on in flags): dict(zip(FLAGS, flags, strict=True))
    for flags in itertools.product((False, True), repeat=len(FLAGS))
}
SPECIALS = {"<|call|>": True, "<|call|>more": False, "<tool_call>": False}
PIECES = [*TOKENS, *SPECIALS, " ", "  ", "\n", "x", "A0", "größer", ".", "<|", "a00000"]


def declare(folder, source, name):
    """A copy of a tokenizer that has the tokens in tokenizer_config.json only, as older folders do."""
    target = folder / name
    target.mkdir()
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text())
    spec = json.loads((source / "tokenizer.json").read_text())
    first = len(spec["model"]["vocab"]) + sum(
        token["id"] >= len(spec["model"]["vocab"]) for token in spec["added_tokens"]
    )
    decoder = {
        str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in spec["added_tokens"]
    }
    new = [{"content": text} | flags for text, flags in TOKENS.items()]
    new += [{"content": text, "special": special, "normalized": False} for text, special in SPECIALS.items()]
    decoder |= {str(first + i): token for i, token in enumerate(new)}
    (target / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": decoder}))
    return target


@pytest.fixture(scope="module")
def pairs(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("added")
    made = {}
    for kind in ("byte_level", "sentencepiece", "gemma_like"):
        declared = declare(root, folders[kind], kind)
        theirs = AutoTokenizer.from_pretrained(declared)
        # And as transformers saves it: everything in tokenizer.json.
        theirs.save_pretrained(root / f"{kind}_saved")
        made[kind] = (Tokenizer.from_folder(declared), theirs)
        made[f"{kind}_saved"] = (Tokenizer.from_folder(root / f"{kind}_saved"), theirs)
    return made


KINDS = [
    *("byte_level", "byte_level_saved", "sentencepiece", "sentencepiece_saved"),
    *("gemma_like", "gemma_like_saved"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_kinds_are_those_of_transformers(pairs, kind):
    ours, theirs = pairs[kind]
    for text in (*TOKENS, *SPECIALS):
        assert ours.added_tokens[text] == theirs.convert_tokens_to_ids(text)
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("kind", KINDS)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8))
@settings(max_examples=150, deadline=None)
def test_text_is_cut_and_joined_like_transformers(pairs, kind, pieces):
    ours, theirs = pairs[kind]
    text = "".join(pieces)
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_tell_of_added_tokens_whole(pairs, kind):
    ours, _ = pairs[kind]
    text = "x A00000 A11111größer<|call|>A00001 <tool_call>x<|call|>more."
    ids = ours.encode(text, add_special_tokens=False)
    for skip in (True, False):
        stream = IncrementalDetokenizer(ours, [], skip_special_tokens=skip)
        deltas = [stream.push(i) for i in ids]
        assert "".join(deltas) + stream.flush() == ours.decode(ids, skip)
        assert any("<tool_call>" in delta for delta in deltas)  # not special: parsers of tool calls need it
        assert any("<|call|>" in delta.replace("<|call|>more", "") for delta in deltas) != skip


def test_a_tokenizer_in_python_only_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(
        ModelError, match=r"\(ByT5Tokenizer\) has no fast version.*convert it to tokenizer.json"
    ):
        Tokenizer.from_folder(tmp_path)


def test_a_vocabulary_without_tokenizer_json_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01 not a sentencepiece model")
    with pytest.raises(ModelError, match="no usable tokenizer in .*jinfer needs tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


# transformers builds each of these from nothing: special tokens and no word.
WITHOUT_VOCABULARY = {
    **{kind: (kind, None, []) for kind in ("qwen2", "qwen3", "gemma", "gemma3_text", "phi", "starcoder2")},
    "llama, named": ("llama", "LlamaTokenizer", []),
    "qwen2, named": ("qwen2", "Qwen2Tokenizer", []),
    "gemma, named": ("gemma", "GemmaTokenizer", []),
    "sentencepiece with one space": ("llama", "T5Tokenizer", []),
    "another class's files": ("llama", "LlamaTokenizer", ["vocab.json", "merges.txt"]),
    "empty files": ("qwen2", "Qwen2Tokenizer", ["vocab.json", "merges.txt"]),
}


@pytest.mark.parametrize("case", WITHOUT_VOCABULARY)
def test_a_folder_without_a_vocabulary_is_refused(tmp_path, case):
    model_type, name, files = WITHOUT_VOCABULARY[case]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if name is not None:
        added = {"7": {"content": "<|im_start|>", "special": True}}
        config = {"tokenizer_class": name, "added_tokens_decoder": added}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for file in files:
        (tmp_path / file).write_text("{}" if file == "vocab.json" else "")
    with pytest.raises(ModelError, match="no usable tokenizer in .*tokenizer.json.*--tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_vocab_and_merges_are_vocabulary_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert Tokenizer.from_folder(tmp_path).encode("abba") == [2, 1, 0]
