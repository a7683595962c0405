"""Trains the bundled tiny model and its draft from scratch, and measures them.

    python -m tools.train_tiny --out DIR [--model main|draft|both] [--steps N | --minutes M] [--seed S]
    python -m tools.train_tiny --evaluate DIR [--draft DIR]

A training run writes checkpoints to `--out` and goes on from them when started again. At its end `--out` holds
`tiny/` and `tiny-draft/`: Hugging Face folders with a model card that states what `--evaluate` measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from tools.tiny import card, export, speed
from tools.tiny.documents import DocumentEncoder, tokenizer_corpus
from tools.tiny.evaluate import Model, Report, evaluate
from tools.tiny.model import TinyConfig, count_parameters
from tools.tiny.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from tools.tiny.train import Recipe, run

MAIN = TinyConfig(num_layers=4)
DRAFT = TinyConfig(hidden_size=96, intermediate_size=256, num_layers=2, head_dim=24)
MAIN_STEPS, DRAFT_STEPS = 2600, 1200
_DTYPE = "bfloat16"
_CORPUS_DOCUMENTS = 20000


def _say(line: str) -> None:
    print(line, flush=True)


def prepare_tokenizer(out: Path, seed: int) -> Path:
    """Trains the tokenizer unless `out` has one already; returns its folder."""
    folder = out / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        _say("training the tokenizer")
        tokenizer = train_tokenizer(tokenizer_corpus(seed, _CORPUS_DOCUMENTS), MAIN.vocab_size)
        save_tokenizer(tokenizer, folder, MAIN.max_positions)
    return folder


def _recipe(name: str, options: argparse.Namespace, tokenizer_folder: Path) -> Recipe:
    config, steps = (MAIN, MAIN_STEPS) if name == "main" else (DRAFT, DRAFT_STEPS)
    recipe = Recipe(steps=options.steps or steps, seed=options.seed)
    if options.minutes is None:
        return recipe
    teacher = MAIN if name == "draft" else None
    fitting = speed.steps_within(config, recipe, tokenizer_folder, options.minutes * 60, teacher)
    _say(f"{name}: {fitting} steps fit in {options.minutes:g} minutes; --steps {fitting} repeats this run")
    return dataclasses.replace(recipe, steps=fitting)


def train_main(options: argparse.Namespace, tokenizer_folder: Path) -> None:
    """Trains the main model and exports it to `tiny`."""
    recipe = _recipe("main", options, tokenizer_folder)
    _say(f"main: {count_parameters(MAIN)} parameters, {recipe.steps} steps")
    params, _ = run(MAIN, recipe, tokenizer_folder, options.out / "main.npz", report=_say)
    export.export(options.out / "tiny", MAIN, params, tokenizer_folder, _DTYPE)


def train_draft(options: argparse.Namespace, tokenizer_folder: Path) -> None:
    """Distils the draft from the exported main model and exports it to `tiny-draft`."""
    if not (options.out / "tiny" / "model.safetensors").exists():
        raise ValueError(
            f"{options.out}/tiny has no main model to learn from: train --model main (or both) first"
        )
    recipe = _recipe("draft", options, tokenizer_folder)
    _say(f"draft: {count_parameters(DRAFT)} parameters, {recipe.steps} steps")
    teacher = export.load(options.out / "tiny")
    params, _ = run(DRAFT, recipe, tokenizer_folder, options.out / "draft.npz", teacher, report=_say)
    export.export(options.out / "tiny-draft", DRAFT, params, tokenizer_folder, _DTYPE)


def measure(folder: Path, draft_folder: Path | None, options: argparse.Namespace) -> Report:
    """Measures an exported model, and the draft beside it where one is given."""
    encoder = DocumentEncoder(load_tokenizer(folder))
    draft = None if draft_folder is None else Model(*export.load(draft_folder))
    return evaluate(encoder, Model(*export.load(folder)), draft, options.examples, options.stories)


def write_cards(main_folder: Path, draft_folder: Path, options: argparse.Namespace) -> None:
    """Measures both models and writes each one's README.md."""
    main_report = measure(main_folder, draft_folder, options)
    draft_report = measure(draft_folder, None, options)
    sizes = [count_parameters(export.load(folder)[0]) for folder in (main_folder, draft_folder)]
    (main_folder / "README.md").write_text(card.main_card(main_report, sizes[0]))
    (draft_folder / "README.md").write_text(card.draft_card(draft_report, main_report, sizes[1]))
    _say(card.table(main_report))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_tiny",
        description="Train or measure the bundled tiny model and its draft.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="train; checkpoints and results go to this folder")
    what.add_argument(
        "--evaluate", type=Path, metavar="DIR", help="measure the exported model in this folder"
    )
    parser.add_argument("--model", choices=["main", "draft", "both"], default="both", help="which to train")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, data and their order")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="training steps (default: those of the bundled model)")
    length.add_argument("--minutes", type=float, help="as many steps as fit, by a measurement at the start")
    parser.add_argument(
        "--draft", type=Path, metavar="DIR", help="with --evaluate: measure agreement with this draft"
    )
    parser.add_argument("--examples", type=int, default=1000, help="test examples per task (default 1000)")
    parser.add_argument(
        "--stories", type=int, default=200, help="stories to generate and check (default 200)"
    )
    parser.add_argument(
        "--write-cards", action="store_true", help="with --evaluate and --draft: write model cards"
    )
    options = parser.parse_args(arguments)
    for name, least in (("steps", 1), ("minutes", 1.0), ("examples", 8), ("stories", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}, expected at least {least:g}")
    if options.write_cards and (options.evaluate is None or options.draft is None):
        parser.error("--write-cards needs --evaluate DIR and --draft DIR")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parse(arguments)
    if options.evaluate is not None:
        if options.write_cards:
            write_cards(options.evaluate, options.draft, options)
        else:
            report = measure(options.evaluate, options.draft, options)
            _say(card.table(report))
            for asked, told in report.samples[:5]:
                _say(f"\n> {asked}\n{told}")
        return 0
    tokenizer_folder = prepare_tokenizer(options.out, options.seed)
    if options.model in ("main", "both"):
        train_main(options, tokenizer_folder)
    if options.model in ("draft", "both"):
        train_draft(options, tokenizer_folder)
        write_cards(options.out / "tiny", options.out / "tiny-draft", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
