"""Every form in which `LLM` takes prompts, and what it refuses."""

import numpy as np
import pytest
import torch

from jinfer import RequestError
from jinfer.prompts import read_prompts

TAKEN = {
    "text": ("hello", ["hello"]),
    "ids": ([1, 2], [[1, 2]]),
    "a tuple of ids": ((1, 2), [[1, 2]]),
    "several": (["a", [1, 2], (3,)], ["a", [1, 2], [3]]),
    "none at all": ([], []),
    "no ids": ([[]], [[]]),
    "an array": (np.array([1, 2]), [[1, 2]]),
    "rows of an array": (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    "arrays": ([np.array([1, 2]), torch.tensor([3])], [[1, 2], [3]]),
    "numpy's integers": ([np.int32(1), np.int64(2)], [[1, 2]]),
    "a generator": ((text for text in "ab"), ["a", "b"]),
    "an object with text": ({"prompt": "hello"}, ["hello"]),
    "an object with ids": ({"prompt_token_ids": (1, np.int32(2))}, [[1, 2]]),
    "an object with an array": ({"prompt_token_ids": np.array([1, 2])}, [[1, 2]]),
    "objects": (
        [{"prompt": "a"}, {"prompt_token_ids": [1]}, "b", [2]],
        ["a", [1], "b", [2]],
    ),
    # The engine refuses these by name.
    "what is no id": ([[1.5], [1, "a"], [True]], [[1.5], [1, "a"], [True]]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken(case):
    given, expected = TAKEN[case]
    found = read_prompts(given)
    assert found == expected
    assert all(type(i) is not np.int32 and type(i) is not np.int64 for ids in found for i in ids)


REFUSED = {
    "nothing": (None, "prompts is None, expected text, a list of token ids"),
    "a number": (5, "prompts is a int"),
    "numbers that are no ids": ([1.5], r"prompts\[0\] is a float"),
    "an array of such": (np.array([1.0, 2.0]), r"prompts\[0\] is a float"),
    "bytes": (b"abc", "prompts is a bytes"),
    "bytes among others": (["a", bytearray(b"b")], r"prompts\[1\] is a bytearray"),
    "nothing among others": (["a", None], r"prompts\[1\] is None"),
    "another key": ({"text": "a"}, "prompts is an object with 'text', expected one key: prompt or"),
    "one key too many": (
        [{"prompt": "a", "multi_modal_data": {}}],
        r"prompts\[0\] is an object with 'prompt', 'multi_modal_data'",
    ),
    "both keys": (
        {"prompt": "a", "prompt_token_ids": [1]},
        "with 'prompt', 'prompt_token_ids', expected one",
    ),
    "no key": ({}, "an object with no keys"),
    "ids as text": ({"prompt": [1, 2]}, r"prompts\['prompt'\] is a list, expected text"),
    "text as ids": ({"prompt_token_ids": "ab"}, r"prompts\['prompt_token_ids'\] is a str, expected a list"),
    "one id": ([{"prompt_token_ids": 1}], r"prompts\[0\]\['prompt_token_ids'\] is a int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    given, message = REFUSED[case]
    with pytest.raises(RequestError, match=message):
        read_prompts(given)
    with pytest.raises(RequestError, match="^continuations"):
        read_prompts(given, "continuations")
