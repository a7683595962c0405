"""A small tokenizer, trained once, and micro settings for the trainer's tests."""

from pathlib import Path

import pytest

from tools.tiny.documents import tokenizer_corpus
from tools.tiny.model import TinyConfig
from tools.tiny.tokenizer import save_tokenizer, train_tokenizer
from tools.tiny.train import Phase, Recipe


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(tokenizer_corpus(0, 400), 512), folder, 128)
    return folder


@pytest.fixture(scope="session")
def micro() -> TinyConfig:
    return TinyConfig(512, 32, 64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=128)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return Recipe(
        steps=20, phases=(Phase(64, 2, 0.8), Phase(128, 1, 0.2)), warmup=2, learning_rate=0.04, small_rate=0.5
    )
