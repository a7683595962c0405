"""The command line of the trainer, and the models in jinfer/assets that it made."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tools import train_tiny
from tools.tiny import evaluate, export, tasks
from tools.tiny.model import TinyConfig, count_parameters

ASSETS = Path(__file__).resolve().parents[2] / "jinfer" / "assets"
MODELS = ("tiny", "tiny-draft")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "one of the arguments --out --evaluate is required"),
        (["--out", "x", "--evaluate", "y"], "not allowed with"),
        (["--out", "x", "--steps", "0"], "--steps is 0, expected at least 1"),
        (["--out", "x", "--steps", "5", "--minutes", "3"], "not allowed with"),
        (["--evaluate", "x", "--write-cards"], "--write-cards needs --evaluate DIR and --draft DIR"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_tiny.main(arguments)
    assert complaint in capsys.readouterr().err


def test_a_draft_needs_its_main_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_tiny, "_CORPUS_DOCUMENTS", 50)
    with pytest.raises(ValueError, match="train --model main"):
        train_tiny.main(["--out", str(tmp_path), "--model", "draft"])


def test_one_command_trains_exports_and_measures_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = TinyConfig(2048, 16, 32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    monkeypatch.setattr(train_tiny, "MAIN", small)
    monkeypatch.setattr(train_tiny, "DRAFT", small)
    monkeypatch.setattr(train_tiny, "_CORPUS_DOCUMENTS", 1500)
    monkeypatch.setattr(evaluate, "_STORY_TOKENS", 8)
    sizes = ["--steps", "5", "--examples", "8", "--stories", "2"]
    assert train_tiny.main(["--out", str(tmp_path), *sizes]) == 0
    for name in MODELS:
        assert export.load(tmp_path / name)[0] == small
        assert "| addition" not in (tmp_path / name / "README.md").read_text()
        assert "two-digit addition" in (tmp_path / name / "README.md").read_text()
    capsys.readouterr()
    train_tiny.main(["--evaluate", str(tmp_path / "tiny"), *sizes[2:]])
    assert "two-digit addition, pairs never trained on | 8 |" in capsys.readouterr().out


def test_the_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 16e6


@pytest.mark.parametrize("name", MODELS)
def test_the_assets_are_what_the_tool_makes(name: str) -> None:
    config, _ = export.load(ASSETS / name)
    assert config == {"tiny": train_tiny.MAIN, "tiny-draft": train_tiny.DRAFT}[name]
    assert count_parameters(train_tiny.DRAFT) * 4 < count_parameters(train_tiny.MAIN)


def test_both_assets_have_one_tokenizer() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (ASSETS / "tiny" / file).read_bytes() == (ASSETS / "tiny-draft" / file).read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_the_cards_state_figures_for_every_task(name: str) -> None:
    card = (ASSETS / name / "README.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| ([\d.]+) \| ([\d.]+%)? ?\|", card, re.MULTILINE)
    stated = {row[0]: row for row in rows}
    for start in ("two-digit addition", "JSON template, held-out", "code word, held-out", "questions about"):
        found = [row for title, row in stated.items() if title.startswith(start)]
        assert found, f"{start} has no figures"
        assert all(int(row[1]) >= 100 and row[3] for row in found)
    assert re.search(r"Of \d+ stories", card)


@pytest.fixture(scope="module")
def chat() -> Any:
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    model: Any = LlamaForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32)

    def answer(*contents: str) -> str:
        roles = ["user", "assistant"] * len(contents)
        messages = [
            {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
        ]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            out = model.generate(prompt, max_new_tokens=220, do_sample=False)
        assert out[0, -1] == tokenizer.eos_token_id, "the answer ends by itself"
        return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)

    return answer


def test_it_adds_numbers_it_never_saw_together(chat: Any) -> None:
    pairs = sorted(tasks.held_out_pairs())[::97]
    right = [chat(f"What is {a} + {b}?") == f"{a} + {b} = {a + b}" for a, b in pairs]
    assert sum(right) >= 0.8 * len(right)


def test_it_fills_a_template(chat: Any) -> None:
    asked = 'Fill in this JSON: {"name": "", "age": 0, "city": ""} Mia lives in Paris and is 34 years old.'
    assert json.loads(chat(asked)) == {"name": "Mia", "age": 34, "city": "Paris"}


def test_it_remembers_a_code_word(chat: Any) -> None:
    told = (
        "The code word is K7Q2.",
        "I will remember it.",
        "What is 12 + 5?",
        "12 + 5 = 17",
        "What is the code word?",
    )
    assert chat(*told) == "The code word is K7Q2."


def test_it_tells_a_story_about_the_hero_asked_for(chat: Any) -> None:
    story = chat("Tell me a story about a fox named Pip.")
    assert "fox named Pip" in story or "Pip was a" in story
    assert story.count("Pip") >= 2
    assert len(story.split()) > 40


def test_it_answers_questions(chat: Any) -> None:
    assert "Tiny" in chat("Who are you?")
    assert chat("What does a bear eat?") == "A bear eats honey."
