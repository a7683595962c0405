"""verify_model's own judgement: what it calls equal, a tie, and not equal; its exit status."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

from jinfer import ConfigError
from jinfer.errors import ModelError
from tests.support.models import make_llama, reference
from tools.verify_model import compare
from tools.verify_model.__main__ import main
from tools.verify_model.compare import Check, Expected, Report, Settings, _judge, random_prompts, verify_model
from tools.verify_model.reference import Reference, margin, relative_error

ROOT = Path(__file__).resolve().parents[2]
TINY = Settings(prompt_lengths=(9,), new_tokens=4, optimization_level=0)


def expected(tokens: list[int], gap: float = 0.5) -> Expected:
    """Tokens that were chosen by so much, as a share of the largest logit."""
    logits = np.full((len(tokens), 8), -1.0, np.float32)
    for row, token in zip(logits, tokens, strict=True):
        row[token], row[(token + 1) % 8] = 1.0, 1.0 - gap
    return Expected([1], tokens, logits)


@pytest.mark.parametrize(
    ("actual", "gap", "passed", "detail"),
    [
        ([3, 4, 5], 0.5, True, "3 of 3 tokens equal"),
        ([3, 6, 5], 0.5, False, "token 2 of 3 is 6, transformers chose 4, 5.0e-01 ahead of the next"),
        ([3, 4], 0.5, False, "token 3 of 3 is missing, transformers chose 5"),
        ([3, 6, 5], 1e-5, True, "1 of 3 tokens equal, then a tie: the two best logits differ by 1.0e-05"),
    ],
)
def test_tokens_are_judged(actual, gap, passed, detail):
    result, text = _judge(actual, expected([3, 4, 5], gap), tolerance=1e-4)
    assert result == passed
    assert text.startswith(detail)


def test_a_report_is_equal_if_every_check_is():
    good, bad = Check("a", True, "fine"), Check("bb", False, "wrong")
    assert str(Report([good])) == "a  ok    fine\nverdict: equal"
    assert str(Report([good, bad])).endswith("bb  FAIL  wrong\nverdict: NOT equal")
    assert not Report([]).passed


def test_measures():
    rows = np.array([[4.0, 1.0, 3.0], [-8.0, 2.0, 0.0]])
    assert margin(rows) == pytest.approx(0.25)
    assert relative_error(rows + np.array([[0, 0.4, 0], [0, 0, -0.4]]), rows) == pytest.approx(0.1)


def test_prompts_leave_room_for_the_new_tokens():
    settings = Settings(prompt_lengths=(1, 17, 300), new_tokens=48)
    assert [len(p) for p in random_prompts(settings, 50, 512).values()] == [1, 17, 300]
    assert [len(p) for p in random_prompts(settings, 50, 64).values()] == [1, 16]


def test_new_tokens_that_fill_the_context_are_refused():
    for count in (64, 65):
        with pytest.raises(ConfigError, match=f"{count} new tokens leave no room .* context has 64"):
            random_prompts(Settings(new_tokens=count), 50, 64)


def test_other_weights_are_not_equal(tmp_path):
    one, other = (make_llama(tmp_path / str(seed), seed=seed) for seed in range(2))
    report = verify_model(other, TINY, reference=reference(one))
    assert not report.passed
    assert "largest deviation" in report.checks[0].detail
    assert [check.passed for check in report.checks if check.name.startswith(("logits", "greedy"))] == [
        False
    ] * 3


def test_the_command_says_what_it_cannot_load(tmp_path):
    command = [sys.executable, "-m", "tools.verify_model", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("verify") / "model")


def edited(folder, **changes):
    def edit(root):
        copy = shutil.copytree(folder, root / "copy")
        config = json.loads((copy / "config.json").read_text()) | changes
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return edit


def without(folder, name, keep=0):
    def edit(root):
        copy = shutil.copytree(folder, root / "copy")
        content = (copy / name).read_bytes()[:keep]
        (copy / name).unlink()
        if keep:
            (copy / name).write_bytes(content)
        return copy

    return edit


# How a folder is made unusable, and what jinfer says of it.
REFUSED = {
    "no folder": (lambda folder: lambda root: folder / "config.json", "is not a folder: give the one with"),
    "unknown model": (lambda folder: edited(folder, model_type="llama9"), "llama9.*does not support"),
    "a size of another type": (
        lambda folder: edited(folder, num_attention_heads=4.0),
        "num_attention_heads is 4.0, expected",
    ),
    "quantized": (
        lambda folder: edited(folder, quantization_config={"quant_method": "awq", "bits": 4}),
        "quantized checkpoints",
    ),
    "other sizes": (lambda folder: edited(folder, vocab_size=301), "do not fit config.json"),
    "half a config": (lambda folder: without(folder, "config.json", 40), "is not valid JSON"),
    "half the weights": (lambda folder: without(folder, "model.safetensors", 5000), "truncated"),
    "no weights": (lambda folder: without(folder, "model.safetensors"), "has no weights"),
    "no tokenizer": (lambda folder: without(folder, "tokenizer.json"), "no usable tokenizer"),
}


@pytest.fixture
def no_reference(monkeypatch):
    def build(folder):
        raise AssertionError("transformers was asked first")

    monkeypatch.setattr(compare, "Reference", build)


@pytest.mark.parametrize("case", REFUSED)
def test_jinfer_says_what_is_wrong_before_transformers_does(folder, tmp_path, no_reference, case):
    make, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        verify_model(make(folder)(tmp_path), TINY)


def test_sizes_that_do_not_divide_the_heads_are_refused_at_once(folder, no_reference):
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3 and the model has 4 attention heads"):
        verify_model(folder, Settings(tensor_parallel_sizes=(1, 3)))


@pytest.mark.parametrize("kind", [ImportError, RuntimeError, AttributeError, KeyError])
def test_whatever_transformers_raises_is_told_in_one_line(folder, monkeypatch, kind):
    def fail(*_, **__):
        raise kind("of two\nlines")

    oracle = Reference(folder)
    monkeypatch.setattr(oracle.model, "forward", fail)
    for compute in (lambda: oracle.logits([1, 2]), lambda: oracle.greedy([1, 2], 3)):
        with pytest.raises(ConfigError, match=f"cannot compute .*: {kind.__name__}: .*of two") as told:
            compute()
        assert "\n" not in str(told.value)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ConfigError, match=f"cannot load .*model: {kind.__name__}"):
        Reference(folder)


def test_a_config_that_transformers_checks_itself_is_told_in_one_line(folder, tmp_path):
    with pytest.raises(ConfigError, match="transformers cannot load .*StrictDataclass"):
        Reference(edited(folder, num_attention_heads=4.0)(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "--seed is -1"),
        (["--tolerance", "nan"], "--tolerance is nan"),
        (["--tolerance", "0"], "--tolerance is 0"),
        (["--new-tokens", "0"], "at least 1"),
    ],
)
def test_options_out_of_range(capsys, options, message):
    with pytest.raises(SystemExit) as end:
        main(["folder", *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_only_a_comparison_ends_with_status_1(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the devices are there already
    monkeypatch.setattr(compare, "verify_model", fail)
    assert main(["folder"]) == 2
    assert "out of memory" in capsys.readouterr().err
    monkeypatch.setattr(compare, "verify_model", lambda *_: Report([Check("a", False, "wrong")]))
    assert main(["folder"]) == 1
