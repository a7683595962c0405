"""Long texts: refused by their length alone where that is certain, and encoded outside Python's lock."""

import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

import jinfer
from jinfer.errors import RequestError
from jinfer.text.tokenizer import Tokenizer

TINY = Path(jinfer.__file__).parent / "assets" / "tiny"
BOUNDED = ("byte_level", "extra_tokens", "sentencepiece", "gemma_like", "llama_class", "metaspace")
AWKWARD = st.text(st.sampled_from(" \n\t\u200b\x00aA1é가각ᄀ\u1161\u11a8\u0301\u0323ﬃ②ⅷΰ‥\u1f82\ufb03😀<|>"))
relaxed = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.from_folder(TINY)


@pytest.mark.parametrize("kind", BOUNDED)
@given(text=st.one_of(AWKWARD, st.text(), AWKWARD.map(lambda part: part * 20)))
@relaxed
def test_no_token_stands_for_more_characters(folders, tokenizer_of, kind, text):
    tokenizer = tokenizer_of(folders[kind])
    bound = tokenizer.characters_per_token
    if bound is not None:
        assert len(text) <= bound * len(tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def tokenizer_of():
    known: dict[str, Tokenizer] = {}
    return lambda folder: known.setdefault(str(folder), Tokenizer.from_folder(folder))


def _byte_level(**parts) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={p: i for i, p in enumerate([*alphabet, "he"])}, merges=[("h", "e")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, value in parts.items():
        setattr(backend, name, value)
    return backend


@given(text=st.one_of(AWKWARD, st.text()))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize(
    "form", [normalizers.NFC(), normalizers.NFKC(), normalizers.NFD(), normalizers.NFKD()]
)
def test_normal_forms_shorten_to_a_quarter_at_most(form, text):
    tokenizer = Tokenizer(_byte_level(normalizer=form))
    assert tokenizer.characters_per_token in (2, 8)
    assert len(text) <= tokenizer.characters_per_token * len(tokenizer.encode(text))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.Replace(tokenizers.Regex(" +"), " ")},
        {"normalizer": normalizers.Replace("  ", " ")},
        {"normalizer": normalizers.StripAccents()},
        {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.BertNormalizer()])},
        {"pre_tokenizer": pre_tokenizers.WhitespaceSplit()},
        {
            "pre_tokenizer": pre_tokenizers.Sequence(
                [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
            )
        },
        {"model": tokenizers.models.BPE(vocab={"a": 0}, merges=[])},
        {"model": tokenizers.models.BPE(vocab={"a": 0, "?": 1}, merges=[], unk_token="?", fuse_unk=True)},
        {"model": tokenizers.models.WordLevel(vocab={"a": 0, "?": 1}, unk_token="?")},
    ],
)
def test_what_may_swallow_any_text_has_no_bound(parts):
    assert Tokenizer(_byte_level(**parts)).characters_per_token is None


def test_an_added_token_that_takes_in_spaces_has_no_bound():
    backend = _byte_level()
    backend.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    assert Tokenizer(backend).characters_per_token is None


def test_too_long_by_its_characters_is_refused_without_work(tiny):
    text = "once upon a time " * 250_000
    start = time.thread_time()
    with pytest.raises(RequestError, match=r"has 4250000 characters .* more than 1024 tokens: shorten it"):
        tiny.encode(text, max_tokens=1024)
    assert time.thread_time() - start < 0.1


def test_too_long_by_its_tokens_is_refused(tiny):
    assert len(tiny.encode("7" * 5000, False, max_tokens=5000)) == 5000
    with pytest.raises(RequestError, match="has 5000 tokens, expected at most 4999"):
        tiny.encode("7" * 5000, False, max_tokens=4999)


def test_other_threads_go_on_while_a_long_text_is_encoded_and_decoded(tiny):
    text = "0123456789 some words " * 6_000
    ids = tiny.encode(text)
    for work in (lambda: tiny.encode(text), lambda: tiny.decode(ids)):
        turns, done = 0, threading.Event()

        def run(work=work, done=done):
            work()
            done.set()

        thread = threading.Thread(target=run)
        start = time.perf_counter()
        thread.start()
        worst, last = 0.0, time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            worst, last, turns = max(worst, now - last), now, turns + 1
        taken = time.perf_counter() - start
        thread.join()
        assert turns > 3, taken
        assert worst < 0.6 * taken
    assert tiny.decode(ids, skip_special_tokens=True) == text


def test_long_texts_have_the_same_ids(tiny):
    for text in ("once upon a time, 1234 " * 400, "größer 😀 наука\n" * 400):
        assert tiny.encode(text) == tiny.backend.encode(text).ids
