"""What the decoder decides from shapes alone."""

from pathlib import Path

import pytest

from jinfer.config import EngineConfig
from jinfer.models.decoder import Decoder
from jinfer.models.hf_config import read_config
from jinfer.models.loading import make_spec

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"


@pytest.mark.parametrize(
    ("model", "devices", "platform", "by_product"),
    [
        ("gpt-oss-20b", 4, "tpu", True),  # 2,880 numbers would be padded to 2,944
        ("gpt-oss-20b", 4, "gpu", False),
        ("llama-3-8b", 4, "tpu", False),
        ("qwen2.5-7b", 1, "tpu", False),
    ],
)
def test_rows_of_an_embedding_that_a_tpu_keeps_by_columns_come_from_a_product(
    model, devices, platform, by_product
):
    config = read_config(CONFIGS / model)
    engine = EngineConfig(model=model, tensor_parallel_size=devices, dtype="bfloat16")
    spec = make_spec(config, engine, platform)
    assert Decoder(config, spec.build, scan=True).embed_by_product is by_product
