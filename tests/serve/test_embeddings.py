"""POST /v1/embeddings: every form of input, both encodings, and what is refused."""

import base64
import struct
from typing import Any

import pytest

from jinfer.pooling import OwnPooling


def vectors(answer):
    return [entry["embedding"] for entry in answer["data"]]


def embed(client, given: Any = "hi", **fields):
    return client.post("/v1/embeddings", {"input": given} | fields)


def test_whole_answer(client, engine):
    answer = embed(client, model="fake", user="somebody").json()
    ids = engine.tokenizer.encode("hi")
    assert answer == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [3.0, float(ids[0]), float(ids[-1]), 4.0]}],
        "model": "fake",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }
    assert engine.seen[0].pooling is engine.default_pooling
    assert engine.seen[0].params.max_tokens == 1


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ("he", [[259, 256]]),
        (["he", "ld"], [[259, 256], [259, 257]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_forms_of_input(client, engine, given, ids):
    bos = engine.tokenizer.bos_id
    answer = embed(client, given).json()
    assert [seen.ids for seen in engine.seen] == [[bos if i == 259 else i for i in each] for each in ids]
    assert [entry["index"] for entry in answer["data"]] == list(range(len(ids)))
    assert [vector[0] for vector in vectors(answer)] == [len(each) for each in ids]
    assert answer["usage"]["total_tokens"] == sum(map(len, ids))


def test_base64_is_little_endian_float32(client):
    plain = vectors(embed(client, ["a", "bcd"], encoding_format="float").json())
    coded = vectors(embed(client, ["a", "bcd"], encoding_format="base64").json())
    assert [list(struct.unpack("<4f", base64.b64decode(text))) for text in coded] == plain


def test_pooling_and_normalizing_can_be_asked_for(client, engine):
    embed(client, pooling="mean", normalize=False)
    embed(client, normalize=False)
    embed(client, pooling="mean")
    asked = [(seen.pooling.pooling, seen.pooling.normalize) for seen in engine.seen]
    assert asked == [("mean", False), ("last", False), ("mean", True)]


def test_a_model_whose_own_pooling_is_unusable_asks_for_one(client, engine, tmp_path):
    (tmp_path / "modules.json").write_text("[1")

    class Unusable(type(engine)):
        default_pooling = property(lambda self: OwnPooling(tmp_path).params())

    del engine.default_pooling
    engine.__class__ = Unusable
    error = client.fault(embed(client), 400)
    assert error["param"] == "pooling"
    assert "modules.json cannot be read" in error["message"]
    assert len(vectors(embed(client, pooling="mean").json())) == 1


def test_special_tokens_can_be_left_out(client, engine):
    embed(client, add_special_tokens=False)
    assert engine.seen[0].ids == engine.tokenizer.encode("hi", add_special_tokens=False)


def test_the_size_may_be_named(client):
    assert len(vectors(embed(client, dimensions=4).json())[0]) == 4


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": None}, "input", "input is left out"),
        ({"input": []}, "input", "input is an empty list"),
        ({"input": ""}, None, None),  # the tokenizer begins every text with a token
        ({"input": [""], "add_special_tokens": False}, "input", "no tokens"),
        ({"input": ["a", 3]}, "input", "expected a string"),
        ({"input": [[1, "a"]]}, "input", r"input[0][1] is a string"),
        ({"input": [9999]}, "input", "token id 9999 is outside the vocabulary"),
        ({"input": "x" * 2000}, "input", "max_model_len is 1000"),
        ({"input": ["a"] * 1025}, "input", "1025 entries, at most 1024"),
        ({"encoding_format": "int8"}, "encoding_format", "expected one of float, base64"),
        ({"dimensions": 2}, "dimensions", "this model's vectors have 4"),
        ({"dimensions": "4"}, "dimensions", "valid integer"),
        ({"pooling": "cls"}, "pooling", "expected one of last, mean"),
        ({"normalize": 1}, "normalize", "valid boolean"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "shorten the prompt"),
        ({"priority": 1}, "priority", "--scheduling-policy priority"),
        ({"stream": True}, "stream", "unknown field"),
        ({"input_type": "query"}, "input_type", "unknown field"),
    ],
)
def test_refusals(client, engine, fields, param, message):
    response = client.post("/v1/embeddings", {"input": "hi"} | fields)
    if message is None:
        assert response.status_code == 200
        return
    error = client.fault(response, 400)
    assert error["param"] == param
    assert message in error["message"]
    assert engine.seen == []


def test_another_model_is_not_found(client):
    assert client.fault(embed(client, model="other"), 404)["code"] == "model_not_found"


def test_faults_of_the_engine(client, engine):
    engine.fail_request_at = 0
    assert client.fault(embed(client, ["a", "b"]), 500)["code"] == "request_failed"
    engine.fail_request_at, engine.capacity = None, 0
    assert client.fault(embed(client), 429)["code"] == "queue_full"


def test_it_takes_no_longer_than_allowed(make_client, engine):
    engine.hold_at = 0
    client = make_client(engine, request_timeout=0.2)
    assert client.fault(embed(client, ["a"] * 9), 504)["code"] == "request_timeout"
    client.state.close()
