"""The family that docs/adding-a-model.md adds: its code is run as it stands there."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jinfer.errors import ModelError
from jinfer.models import family
from jinfer.models.hf_config import read_config
from tests.support.models import make_model
from tools.verify_model.compare import Settings, verify_model

DOCS = Path(__file__).resolve().parents[2] / "docs" / "adding-a-model.md"
SETTINGS = Settings(prompt_lengths=(20,), new_tokens=6, optimization_level=0)
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def stablelm(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    module = types.ModuleType("jinfer.models.stablelm")
    exec(compile(code, str(DOCS), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(family, "MODEL_TYPES", (*family.MODEL_TYPES, "stablelm"))


def test_it_is_unknown_before(tmp_path):
    with pytest.raises(
        ModelError, match="config keys that Llama has not: layer_norm_eps, partial_rotary_factor"
    ):
        read_config(make_model("stablelm", tmp_path, **IDS))


@pytest.mark.parametrize(
    "options", [{"use_qkv_bias": True, "hidden_size": 64}, {"use_parallel_residual": True, "hidden_size": 96}]
)
def test_it_equals_transformers(stablelm, options, tmp_path):
    report = verify_model(make_model("stablelm", tmp_path, **IDS, **options), SETTINGS)
    assert report.passed, str(report)


def test_what_it_lacks_is_refused(stablelm, tmp_path):
    with pytest.raises(ModelError, match="qk_layernorm is True, expected False or None"):
        read_config(make_model("stablelm", tmp_path, qk_layernorm=True, **IDS))
