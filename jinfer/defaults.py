"""What a model's generation_config.json says about requests that leave something open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinfer.errors import ConfigError, ModelError, RequestError
from jinfer.sampling.params import SamplingParams
from jinfer.token_ids import read_token_ids

FILE = "generation_config.json"
AUTO, NONE = "auto", "vllm"
# Name in the file -> name in SamplingParams.
KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def generation_defaults(choice: str, model_folder: Path) -> dict[str, Any]:
    """Fields of SamplingParams for requests that give none of their own; {} where nothing is stated.

    choice: "auto": of the model's own file; "vllm": none; else of the file in that folder. `do_sample: false` is
    temperature 0.

    Raises:
      ConfigError: a named folder has no such file. ModelError: the file cannot be read, or a value is out of range.
    """
    values = {} if choice == NONE else _read(choice, model_folder)
    defaults = {KEYS[name]: values[name] for name in KEYS if values.get(name) is not None}
    if values.get("do_sample") is False:
        # What shapes the draw is of no effect then, and files often state it all the same.
        defaults = {k: v for k, v in defaults.items() if k in ("repetition_penalty", "max_tokens")}
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise ModelError(
            f"{FILE} of {model_folder if choice == AUTO else choice}: {error}. Correct it, or start with "
            f"--generation-config {NONE} to leave it out"
        ) from error
    return defaults


def generation_end_ids(choice: str, model_folder: Path, vocab_size: int) -> frozenset[int]:
    """The ids that end a generation by the file of a named folder; the model's own are read with its config."""
    if choice in (AUTO, NONE):
        return frozenset()
    ids = _read(choice, model_folder).get("eos_token_id")
    return frozenset(read_token_ids(ids, vocab_size, f"{FILE} of {choice}"))


def _read(choice: str, model_folder: Path) -> dict[str, Any]:
    file = (model_folder if choice == AUTO else Path(choice)) / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if choice == AUTO:
            return {}
        raise ConfigError(
            f"generation_config is {choice!r}, and there is no {file}: expected {AUTO!r}, {NONE!r} or a folder "
            "that has one"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file} cannot be read as JSON ({error}): correct it or download it again"
        ) from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds a {type(values).__name__}, expected a JSON object")
    return values
