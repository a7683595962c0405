"""verify_model's own judgement: what it calls equal, a tie, and not equal; its exit status."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.models import make_llama, reference
from tools.verify_model.compare import Check, Expected, Report, Settings, _judge, random_prompts, verify_model
from tools.verify_model.reference import margin, relative_error

ROOT = Path(__file__).resolve().parents[2]
TINY = Settings(prompt_lengths=(9,), new_tokens=4)


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
