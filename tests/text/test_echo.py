"""A prompt's echo, joined with the output's text, is the text of both together; offsets point at their tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jinfer.text.tokenizer import Tokenizer
from tests.text.test_incremental import KINDS, stream, token_ids

some = settings(max_examples=60, deadline=None)
EXACT = [kind for kind in KINDS if kind not in ("wordpiece", "metaspace", "extra_tokens", "gemma_like")]


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {kind: Tokenizer.from_folder(folders[kind]) for kind in KINDS}


def joined(tokenizer, prompt, output, skip=True):
    """Echo, join and the output's deltas, one token at a time."""
    echo = tokenizer.echo(prompt, skip)
    join, text = echo.join(), echo.text
    deltas, _ = stream(tokenizer, output, prompt, skip_special_tokens=skip)
    for token_id, delta in zip(output, deltas, strict=False):
        text += join.push([token_id]) + delta
    return text + join.finish() + deltas[-1]


@pytest.mark.parametrize("kind", EXACT)
@given(data=st.data(), skip=st.booleans())
@some
def test_echo_and_output_are_the_decoded_text(tokenizers, kind, data, skip):
    tokenizer = tokenizers[kind]
    ids = data.draw(token_ids(tokenizer))
    cut = data.draw(st.integers(0, len(ids)))
    assert joined(tokenizer, ids[:cut], ids[cut:], skip) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "llama_class"])
@pytest.mark.parametrize("text", ["é🙂👩‍👩‍👧", "a🙂é b", "🙂"])
def test_a_character_is_cut_anywhere(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    for cut in range(len(ids) + 1):
        assert joined(tokenizer, ids[:cut], ids[cut:]) == tokenizer.decode(ids) == text
    # What is begun and never completed is shown as decoding shows it, with an output behind it and without.
    other = tokenizer.encode("x", add_special_tokens=False)
    for cut in range(len(ids) + 1):
        for output in ([], other, [*other, *ids]):
            assert joined(tokenizer, ids[:cut], output) == tokenizer.decode([*ids[:cut], *output])


def test_a_byte_that_is_no_text_spoils_the_run_it_continues(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    run = tokenizer.encode("日é🙂", add_special_tokens=False)[-9:]
    bad = tokenizer.token_to_id("<0xFF>")
    for ids in ([*run, bad], [bad, *run], [*run[:7], bad, *run[7:]]):
        for cut in range(len(ids) + 1):
            assert joined(tokenizer, ids[:cut], ids[cut:]) == tokenizer.decode(ids) == "\ufffd" * 10


@pytest.mark.parametrize("kind", EXACT)
@given(data=st.data(), skip=st.booleans())
@some
def test_an_offset_is_the_length_of_the_text_in_front(tokenizers, kind, data, skip):
    tokenizer = tokenizers[kind]
    ids = data.draw(token_ids(tokenizer))
    offsets = tokenizer.text_offsets(skip_special_tokens=skip)
    for i, token_id in enumerate(ids):
        at = offsets.push(token_id)
        before, echo = tokenizer.decode(ids[:i], skip), tokenizer.echo(ids[:i], skip)
        if before == echo.text:  # it ends between two characters
            assert at == len(before)


def test_the_beginning_of_a_surrogate_is_two_characters(tokenizers):
    tokenizer = tokenizers["byte_level"]
    byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [byte[b"\xed"], byte[b"\xa0"], byte[b"a"], byte[b"a"]]
    offsets = tokenizer.text_offsets()
    assert [offsets.push(i) for i in ids] == [0, 0, 2, 3]
    assert tokenizer.decode(ids) == "\ufffd\ufffdaa"


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "llama_class", "metaspace"])
@pytest.mark.parametrize("text", ["größer 日本é🙂 and 👩‍👩‍👧", "🙂é"])
def test_offsets_point_at_their_tokens(tokenizers, kind, text):
    """In the text of the whole, and in that of an output that begins anywhere."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    text = tokenizer.decode(ids)
    for cut in range(len(ids)):
        offsets = tokenizer.text_offsets(ids[:cut])
        begin = len(text) - len("".join(stream(tokenizer, ids[cut:], ids[:cut])[0]))
        for token_id in ids[cut:]:
            at, piece = begin + offsets.push(token_id), tokenizer.token_text(token_id)
            if "\ufffd" not in piece and token_id not in tokenizer.special_ids:
                assert text[at:].startswith((piece, piece.lstrip(" "))), (cut, piece, at)
