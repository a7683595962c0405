"""The tokenizer gives what transformers gives, starts without it, and says what is wrong with a folder."""

import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jinfer.errors import ModelError, RequestError
from jinfer.text.tokenizer import Tokenizer

KINDS = [
    *("byte_level", "extra_tokens", "sentencepiece", "gemma_like", "strips_two", "llama_class"),
    *("metaspace", "wordpiece"),
]
TEXTS = [
    "",
    " ",
    "the quick brown fox",
    " leading, trailing ",
    "don't stop . now , ok ?",
    "<|im_start|>user\nhi<|im_end|> there <s>",
    "<|end|> <|image|> <|extra|> <tool>日本語",
    "größer 😀👩‍👩‍👧 наука\u00a0x\u200bz",
    "a\r\n\n\t  b",
]
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def pairs(folders):
    return {
        kind: (Tokenizer.from_folder(folders[kind]), AutoTokenizer.from_pretrained(folders[kind]))
        for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encodes_like_transformers(pairs, kind, add_special_tokens):
    ours, theirs = pairs[kind]
    expected = [theirs.encode(text, add_special_tokens=add_special_tokens) for text in TEXTS]
    assert [ours.encode(text, add_special_tokens) for text in TEXTS] == expected
    assert ours.encode_batch(TEXTS, add_special_tokens) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
@relaxed
def test_decodes_like_transformers(pairs, kind, data, skip):
    ours, theirs = pairs[kind]
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30))
    assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_names_the_same_special_tokens(pairs, kind):
    ours, theirs = pairs[kind]
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}


def test_token_bytes_are_the_parts_of_characters(pairs):
    byte_level, _ = pairs["byte_level"]
    ids = byte_level.encode("größer 👩‍👧 <tool>", add_special_tokens=False)
    assert b"".join(byte_level.token_bytes(i) for i in ids).decode() == "größer 👩‍👧 <tool>"
    sentencepiece, _ = pairs["sentencepiece"]
    ids = sentencepiece.encode("größer 👧", add_special_tokens=False)
    assert b"".join(sentencepiece.token_bytes(i) for i in ids).decode() == " größer 👧"
    assert sentencepiece.token_text(ids[0]).startswith(" ")
    assert byte_level.token_bytes(10**6) == b""


def test_eos_ids_come_from_the_generation_config_too(folders, tmp_path):
    folder = shutil.copytree(folders["byte_level"], tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    assert Tokenizer.from_folder(folder).eos_ids == {2, 4}


def test_a_plain_folder_needs_no_transformers_and_no_jax(folders):
    code = (
        "import sys; from jinfer.text import Tokenizer; "
        f"Tokenizer.from_folder({str(folders['byte_level'])!r}).encode('x'); "
        "sys.exit(any(name in sys.modules for name in ('transformers', 'jax', 'torch')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_truncation_in_the_file_does_not_cut_prompts(folders, tmp_path):
    folder = shutil.copytree(folders["byte_level"], tmp_path / "model")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"


def test_half_a_surrogate_pair_is_refused(pairs):
    tokenizer = pairs["byte_level"][0]
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch(["ok", text])):
        with pytest.raises(RequestError, match=r"U\+D83D.* at character 3"):
            call("abc\ud83d")


def test_unusable_folders_are_named(folders, tmp_path):
    with pytest.raises(ModelError, match="no usable tokenizer in .*empty"):
        Tokenizer.from_folder(tmp_path / "empty")
    broken = shutil.copytree(folders["byte_level"], tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer.json is not a tokenizer"):
        Tokenizer.from_folder(broken)
    (broken / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ModelError, match="tokenizer_config.json cannot be read as JSON"):
        Tokenizer.from_folder(broken)
