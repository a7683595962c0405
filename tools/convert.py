"""Writes a model in the form in which it is served: loaded once, saved with Orbax, started from without
conversion.

    python -m tools.convert --model DIR --output OUT [--dtype bfloat16] [--tensor-parallel-size N]

OUT then serves as `--model OUT`, on any number of devices. It holds the arrays and the config, tokenizer
and template files of the model; config.json there states the dtype that the arrays have.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinfer.cli import parse_args
from jinfer.config import BUNDLED_MODEL, EngineConfig, check_fields, option
from jinfer.errors import ConfigError, ModelError, UserError

# What a model folder may have beside its weights; anything else (code above all) stays behind.
COPIED = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.md",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*.jinja",
)
LEFT_OUT = ("*.index.json", "jinfer.json")


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and into what."""

    model: str = option(BUNDLED_MODEL, "model folder, hub id, or the name of the bundled model")
    output: str | None = option(None, "folder to write; must be new or empty")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    dtype: str = option(
        "auto",
        "dtype of the saved weights; auto: as config.json says",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    tensor_parallel_size: int = option(
        1, "devices to load onto; each writes its own slices", low=1, high=1024
    )

    def __post_init__(self) -> None:
        check_fields(self)


def convert(config: ConvertConfig) -> Path:
    """Loads the model and writes it to `config.output`; returns that folder.

    Raises:
      ConfigError: no output folder was given, or it is not empty.
      ModelError: the model cannot be loaded or the folder cannot be written.
    """
    if not config.output:
        raise ConfigError("no output folder given: say where to write with --output DIR")
    output = Path(config.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not an empty folder: choose another one")
    from jinfer.models.checkpoint import head_of
    from jinfer.models.hf_config import read_config
    from jinfer.models.loading import load_model
    from jinfer.platform import prepare_platform
    from jinfer.weights.hub import resolve_model
    from jinfer.weights.orbax_store import save_orbax

    source = resolve_model(config.model, config.revision)
    dtype = config.dtype if config.dtype != "auto" else read_config(source).dtype or "auto"
    # Layers apart is the form that both loops can be made from without holding a stack twice.
    engine = EngineConfig(
        model=str(source), dtype=dtype, tensor_parallel_size=config.tensor_parallel_size, layer_loop="unroll"
    )
    prepare_platform(engine)
    loaded = load_model(engine, progress=sys.stderr.isatty())
    stored = str(loaded.spec.build.dtype)
    copy_files(source, output, stored)
    meta = {
        "dtype": stored,
        "tensor_parallel_size": config.tensor_parallel_size,
        "source": source.name,
        "head": head_of(loaded.config),
    }
    save_orbax(output, loaded.params.arrays, meta)
    return output


def copy_files(source: Path, output: Path, dtype: str) -> None:
    """Copies config, tokenizer and template files; in config.json the dtype becomes that of the saved arrays."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for pattern in COPIED:
            for file in source.glob(pattern):
                if file.is_file() and not any(file.match(left) for left in LEFT_OUT):
                    target = output / file.relative_to(source)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, target)
        config = json.loads((output / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{output} cannot be written: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    config: ConvertConfig = parse_args(
        {"conversion": ConvertConfig},
        argv,
        prog="python -m tools.convert",
        description="Saves a model as it is served.",
    )["conversion"]
    started = time.perf_counter()
    try:
        output = convert(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    seconds = time.perf_counter() - started
    print(f"{output}: {size / 1e6:.1f} MB in {seconds:.1f} s; serve it with --model {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
