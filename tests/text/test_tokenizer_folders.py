"""Generated tokenizer folders, whose files name tokens in every way and contradict each other, against AutoTokenizer."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jinfer.text import files, tokenizer
from jinfer.text.tokenizer import Tokenizer
from tests.text.conftest import MAKERS

FOLDERS = 60
TOKENS = ["<|a|>", "<|b|>", "<tool>", "[IMG]", "zz", "<pad>", " sp ", "日x"]
THERE = ["<s>", "</s>", "<unk>"]
NAMES = [*files.NAMED_TOKENS, "image_token"]
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
TEXTS = (
    "the quick <|a|>brown<|b|> fox <tool>x[IMG] [IMG]",
    "zz azz zz. sp  <pad><s>hello</s> 日x日 <|a|> .",
    " a  sp b größer",
)


def flags(r: random.Random) -> dict[str, bool]:
    return {flag: r.random() < 0.5 for flag in FLAGS}


def named(r: random.Random) -> Any:
    typed = {"__type": "AddedToken", "content": r.choice(TOKENS), **flags(r), "special": True}
    return r.choice([*THERE, r.choice(TOKENS), None, typed])


def write_folder(seed: int, folder: Path, specs: list[str]) -> Path:
    """tokenizer.json of some kind, and what stands beside it."""
    r = random.Random(seed)
    spec = json.loads(r.choice(specs))
    if r.random() < 0.2:
        spec["post_processor"] = None
    config: dict[str, Any] = {
        "tokenizer_class": r.choice(["PreTrainedTokenizerFast", "TokenizersBackend"]),
        **{name: named(r) for name in NAMES if r.random() < 0.3},
    }
    choices: dict[str, list[Any]] = {
        "extra_special_tokens": [[r.choice(TOKENS)], {"video_token": r.choice(TOKENS)}, None],
        "additional_special_tokens": [[r.choice(TOKENS)], None, []],
        "model_specific_special_tokens": [{"image_token": r.choice(TOKENS)}, None],
        "add_bos_token": [True, False, None],
        "add_eos_token": [True, False, None],
        "split_special_tokens": [True, False, None],
        "clean_up_tokenization_spaces": [True, False, None],
        "model_max_length": [None, 5],
    }
    config |= {key: r.choice(values) for key, values in choices.items() if r.random() < 0.15}
    if r.random() < 0.3:
        new = [{"content": r.choice(TOKENS), **flags(r), "special": r.random() < 0.5} for _ in range(2)]
        config["added_tokens_decoder"] = {str(500 + i): token for i, token in enumerate(new)}
    written: dict[str, Any] = {"tokenizer.json": spec, "tokenizer_config.json": config}
    if r.random() < 0.4:
        older = {name: r.choice([r.choice(TOKENS), "</s>", None]) for name in NAMES if r.random() < 0.3}
        objects = [{"content": r.choice(TOKENS), **flags(r)} for _ in range(2)]
        more = {"additional_special_tokens": objects} if r.random() < 0.3 else {}
        written["special_tokens_map.json"] = {**older, **more}
    if r.random() < 0.4:
        written["added_tokens.json"] = {token: 600 + i for i, token in enumerate(r.sample(TOKENS, 2))}
    if r.random() < 0.3:
        written["config.json"] = {"model_type": r.choice(["llama", "qwen2", "mistral", "phi3"])}
    folder.mkdir()
    for name, value in written.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def specs() -> list[str]:
    return [MAKERS[kind][0]().to_str() for kind in ("byte_level", "sentencepiece", "gemma_like", "metaspace")]


def test_generated_folders_are_read_as_transformers_reads_them(specs, tmp_path):
    compared = 0
    for seed in range(FOLDERS):
        folder = write_folder(seed, tmp_path / str(seed), specs)
        try:
            theirs = AutoTokenizer.from_pretrained(folder)
        except Exception:  # it cannot read the folder: there is nothing to compare
            continue
        compared += 1
        ours = Tokenizer.from_folder(folder)
        for text in TEXTS:
            ids = theirs.encode(text)
            assert ours.encode(text) == ids, (seed, text)
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), (seed, text)
        assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id), seed
        assert ours.vocab_size == len(theirs), seed
    assert compared > 0.8 * FOLDERS


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize(
    "where", ["added_tokens.json", "special_tokens_map.json", "model_specific_special_tokens"]
)
def test_tokens_that_one_file_alone_names_are_one_id(name, where, specs, tmp_path):
    config: dict[str, Any] = {"tokenizer_class": name}
    (tmp_path / "tokenizer.json").write_text(specs[0])
    if where == "added_tokens.json":
        (tmp_path / where).write_text(json.dumps({"<|image|>": 422}))
    elif where == "special_tokens_map.json":
        (tmp_path / where).write_text(json.dumps({"additional_special_tokens": ["<|image|>"]}))
    else:
        config[where] = {"image_token": "<|image|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode("a<|image|>", add_special_tokens=False)[1:] == [ours.added_tokens["<|image|>"]]
    assert ours.encode("<|image|>b") == AutoTokenizer.from_pretrained(tmp_path).encode("<|image|>b")


def test_a_folder_whose_files_agree_needs_no_transformers(folders, tmp_path, monkeypatch):
    """Importing it takes most of a second."""

    def refuse(*args: Any) -> None:
        raise AssertionError("transformers builds a tokenizer that tokenizer.json already says")

    monkeypatch.setattr(tokenizer, "_build_with_transformers", refuse)
    AutoTokenizer.from_pretrained(folders["byte_level"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    tokens = {str(token.pop("id")): token for token in spec["added_tokens"]}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": 420}))
    assert Tokenizer.from_folder(tmp_path).eos_id == 2
    for more in ({"added_tokens_decoder": tokens}, {"additional_special_tokens": ["<|im_start|>"]}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | more))
        assert Tokenizer.from_folder(tmp_path).eos_id == 2
