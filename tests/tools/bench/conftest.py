"""A model and work small enough that the benchmarks themselves take no time."""

import pytest

from tools.bench import models

SMALL = models.RandomLlama(32, 64, 2, 4, 2, 400, max_position_embeddings=128)


@pytest.fixture(scope="session")
def small_shape():
    return SMALL


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "small"
    models.write_model(SMALL, folder)
    return folder


@pytest.fixture(scope="session")
def small_engine():
    # Few and small steps: each is a program to compile.
    return ["--max-model-len", "64", "--max-num-seqs", "2", "--max-num-batched-tokens", "16"]


@pytest.fixture(scope="session")
def small_work():
    return ["--num-requests", "6", "--prompt-len", "3:20", "--output-len", "2:12", "--repeats", "2"]


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    monkeypatch.setattr("tools.bench.alternate.REST_SECONDS", 0.0)
