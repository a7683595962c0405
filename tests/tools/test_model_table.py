"""The table of docs/models.md: what configurations say, how rows are merged, and that a step compiles at real size."""

import importlib.util
import json

import pytest

from jinfer.models.family import MODEL_TYPES
from tools.compile_check import models
from tools.compile_check.models import BEGIN, END, HEADER, MODELS, NOT_COMPILED, Row, facts_of, merge, names

PAGE = MODELS.parents[1] / "docs" / "models.md"

# What the publishers say, in billions.
PARAMETERS = {
    "deepseek-v2-lite": 15.71,
    "gemma-2-9b": 9.24,
    "gemma-3-27b": 27.01,
    "gemma-7b": 8.54,
    "glm-4-9b": 9.40,
    "gpt-oss-20b": 20.91,
    "granite-3.3-8b": 8.17,
    "llama-3-8b": 8.03,
    "mistral-7b": 7.24,
    "mixtral-8x7b": 46.70,
    "moonlight-16b-a3b": 15.96,
    "olmo-2-7b": 7.30,
    "phi-2": 2.78,
    "phi-3-medium": 13.96,
    "phi-3-mini": 3.82,
    "qwen1.5-moe-a2.7b": 14.32,
    "qwen2.5-7b": 7.62,
    "qwen3-30b-a3b": 30.53,
    "qwen3-8b": 8.19,
    "smollm3-3b": 3.08,
    "starcoder2-7b": 7.17,
}


def test_every_family_has_a_model():
    families = {json.loads((MODELS / name / "config.json").read_text())["model_type"] for name in names()}
    assert families == set(MODEL_TYPES)


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_the_published_number_of_parameters(name):
    assert facts_of(name)["parameters"] / 1e9 == pytest.approx(PARAMETERS[name], abs=0.006)


def test_kv_bytes_follow_from_heads_and_windows():
    gemma = facts_of("gemma-3-27b")
    # 62 layers of 16 heads of 128, keys and values, two bytes each; 52 of them with a window of 1024.
    assert gemma["kv_bytes_per_token"] == 62 * 16 * 128 * 2 * 2
    assert gemma["windowed_kv_bytes_per_token"] == 52 * 16 * 128 * 2 * 2
    assert gemma["windows"] == [1024]
    assert 10 / 62 < gemma["kv_fraction"] < 10 / 62 + 0.02
    qwen = facts_of("qwen2.5-7b")  # its config names a window and says that it is not used
    assert (qwen["windows"], qwen["kv_fraction"]) == ([], 1.0)


def row(name: str, temporaries: int | None = 5_000_000, aliased: int = 100) -> Row:
    facts = {
        "family": "llama",
        "parameters": 8_030_261_248,
        "weight_bytes": 2**30,
        "kv_bytes_per_token": 131072,
        "windowed_kv_bytes_per_token": 65536,
        "windows": [128],
        "longest": 8192,
        "kv_fraction": 0.5,
    }
    step = {"temp_bytes": temporaries, "alias_bytes": aliased, "kv_bytes": 100}
    compiled = {"attention": "tpu", "decode": step, "mixed": step}
    return Row(name, 4, facts, None if temporaries is None else compiled)


def test_rows_take_their_place_in_the_page():
    page = f"before\n{BEGIN}\n{END}\nafter\n"
    page = merge(page, [str(row("b")), str(row("a"))])
    page = merge(page, [str(row("b", 9_000_000))])
    lines = page.splitlines()
    assert lines[:4] == ["before", BEGIN, *HEADER]
    assert lines[-2:] == [END, "after"]
    assert [line.split("|")[1].strip() for line in lines[4:-2]] == ["a", "b"]
    cells = [cell.strip() for cell in lines[5].split("|")[1:-1]]
    assert cells == [
        *("b", "llama", "8.03e9", "4", "1.00", "131,072", "65,536 (128)"),
        *("0.500 at 8,192 tokens", "tpu", "9.0", "9.0"),
    ]
    page = merge(page, [str(row("a", None)), str(row("c", None))])
    assert merge(page, [str(row("c"))]).count(NOT_COMPILED) == 0  # and "a" keeps what was compiled
    assert page.count(NOT_COMPILED) == 3
    with pytest.raises(ValueError, match="expected one"):
        merge("no table", [])


def test_copied_pages_are_a_problem():
    assert row("a").problem is None
    assert "99 of 100 bytes are aliased" in str(row("a", aliased=99).problem)


def test_the_page_has_a_row_for_every_model():
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert [cells[0].strip() for cells in rows] == names()
    for cells in rows:
        name = cells[0].strip()
        facts = facts_of(name)
        assert cells[1].strip() == facts["family"]
        assert cells[5].strip() == f"{facts['kv_bytes_per_token']:,}"
        assert float(cells[4]) * 2**30 * int(cells[3]) >= 2 * facts["parameters"] * 0.99


def test_unknown_models_are_named(capsys):
    assert models.main(["--model", "llama-9"]) in (1, 2)
    assert capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.timeout(900)
def test_a_row_compiles_at_real_width(tmp_path, monkeypatch, capsys):
    """Two periods of its layers at full width, and a part of its vocabulary: the whole takes twice as long."""
    config = json.loads((MODELS / "smollm3-3b" / "config.json").read_text())
    less: dict[str, object] = {name: config[name][:8] for name in ("layer_types", "no_rope_layers")}
    less |= {"num_hidden_layers": 8, "vocab_size": 16384}
    (tmp_path / "shallow").mkdir()
    (tmp_path / "shallow" / "config.json").write_text(json.dumps(config | less))
    monkeypatch.setattr(models, "MODELS", tmp_path)
    status = models.main(["--model", "shallow", "--rows", "8", "--tokens", "64", "--context", "1024"])
    said = capsys.readouterr()
    assert status == 0, said.err
    cells = [cell.strip() for cell in said.out.splitlines()[-1].split("|")[1:-1]]
    assert cells[0] == "shallow"
    assert float(cells[4]) * 2**30 * 4 == pytest.approx(2 * facts_of("shallow")["parameters"], rel=0.05)
