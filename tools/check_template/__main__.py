"""Tries a chat template with the histories that clients send: `python -m tools.check_template FILE_OR_MODEL ...`"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

DESCRIPTION = """\
Render chat histories with jinfer and with transformers, and say of each:

  equal    jinfer's prompt is the one that transformers makes of the messages as they were sent
  mapped   transformers fails with them as they were sent, or loses something; jinfer's prompt is the one that it
           makes of the same messages in the form that the template needs
  refused  jinfer answers with an error that says what the template cannot show
  dropped  something of the history is not in the prompt
  differs  the prompts differ

Exit status: 0, 1 if anything is dropped or differs, 2 if a template cannot be read."""
# Templates in files have no tokenizer; they print these.
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_template",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "templates", nargs="+", metavar="FILE_OR_MODEL", help="a Jinja file, a model folder or a hub id"
    )
    parser.add_argument("--json", action="store_true", help="print a list of cells as JSON")
    parser.add_argument("--all", action="store_true", help="show the rows that are equal too")
    options = parser.parse_args(arguments)

    from jinfer import UserError
    from jinfer.text import ChatTemplate
    from jinfer.weights.hub import resolve_model
    from tools.check_template.check import BAD, OUTCOMES, Cell, check

    def load(name: str) -> ChatTemplate:
        path = Path(name)
        if path.is_file():
            return ChatTemplate({"default": path.read_text(encoding="utf-8")}, SPECIAL_TOKENS)
        template = ChatTemplate.from_folder(resolve_model(name, weights=False))
        if template is None:
            raise UserError(f"{name} has no chat template: name a file with one")
        return template

    found: list[Cell] = []
    for name in options.templates:
        label = Path(name).stem if Path(name).is_file() else name
        try:
            cells = list(check(label, load(name)))
        except (UserError, OSError, UnicodeDecodeError) as error:
            print(f"check_template: error: {name}: {error}", file=sys.stderr)
            return 2
        found += cells
        if not options.json:
            _print_cells(label, cells, options.all)
    counts = Counter(cell.outcome for cell in found)
    if options.json:
        print(json.dumps([asdict(cell) for cell in found], indent=1, ensure_ascii=False))
    else:
        summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
        print(f"{len(options.templates)} templates, {len(found)} histories: {summary}")
    return 1 if any(counts[outcome] for outcome in BAD) else 0


def _print_cells(label: str, cells: list, shows_all: bool) -> None:
    counts = Counter(cell.outcome for cell in cells)
    print(f"{label}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    shown = [cell for cell in cells if shows_all or cell.outcome != "equal"]
    first = max((len(cell.history) for cell in shown), default=0)
    width = max(40, shutil.get_terminal_size((120, 24)).columns - first - 14)
    for cell in shown:
        lines = textwrap.wrap(cell.detail, width, max_lines=3, placeholder=" ...") or [""]
        print(f"  {cell.history:<{first}}  {cell.outcome:<8}  {lines[0]}".rstrip())
        for line in lines[1:]:
            print(" " * (first + 14) + line)
    print()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
