"""Command-line flags and YAML files, both made from the fields of frozen dataclasses.

A field `max_model_len: int | None` gives the flag `--max-model-len` and the YAML keys `max-model-len` and
`max_model_len`; a boolean field gives `--name` and `--no-name`; a field `names: tuple[str, ...]` gives a flag that may
have several values and may be repeated, and a YAML list. Any other flag may be given once. A flag on the command line
overrides the file named by `--config`. Whatever is wrong ends the process with status 2 and one line on stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinfer.config import LIST
from jinfer.errors import ConfigError

HELP_COLUMN = 30
HELP_WIDTH = 110
MAX_YAML_BYTES = 1024 * 1024


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the flags)\n")


class _Once(argparse.Action):
    """Refuses a flag that is given twice: which of the two was meant is not for the program to say."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _refuse_repeated(parser, namespace, self.dest, option_string)
        setattr(namespace, self.dest, values)


class _Switch(argparse.BooleanOptionalAction):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _refuse_repeated(parser, namespace, self.dest, option_string)
        super().__call__(parser, namespace, values, option_string)


class _Several(argparse.Action):
    """Gathers the values of a flag, from one use or from several; a JSON list counts as its entries."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        entries = [entry for value in values for entry in _entries(value)]
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *entries))


def _refuse_repeated(parser: Any, namespace: Any, dest: str, flag: str | None) -> None:
    if hasattr(namespace, dest):
        parser.error(f"{flag} is given more than once: keep one")


def _entries(text: str) -> list[str]:
    if text.startswith("["):
        try:
            value = json.loads(text)
        except ValueError:
            return [text]
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return value
    return [text]


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=HELP_COLUMN, width=HELP_WIDTH)

    def _split_lines(self, text: str, width: int) -> list[str]:
        # A default or a range is one thing: do not break a line inside "[default: 512]".
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def parse_args(
    classes: Mapping[str, type],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
    version: str | None = None,
) -> dict[str, Any]:
    """Configs from the command line, one per entry of `classes` (title of the --help group -> dataclass).

    Returns the instances under the same titles. `--help` and `--version` end the process with status 0, every error
    with status 2.
    """
    homes = _homes(classes)
    parser = _make_parser(classes, prog, description, version)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        parser.error(f"unknown flag {unknown[0]!r}{f', did you mean {close[0]}?' if close else ''}")
    args = vars(known)
    file = args.pop("config_file", None)
    try:
        values = {} if file is None else read_yaml(file)
        _check_keys(values, homes, f"{file}")
        values |= args
        return {title: _build(cls, values) for title, cls in classes.items()}
    except ConfigError as error:
        parser.error(str(error))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, '-' in its keys turned into '_'. ConfigError if it cannot be read as one."""
    import yaml  # 25 ms that a start without a file does not pay

    try:
        text = Path(path).read_bytes()
        if len(text) > MAX_YAML_BYTES:
            raise ConfigError(
                f"{path} has {len(text)} bytes, expected a YAML file of at most {MAX_YAML_BYTES}"
            )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_repeated_keys(node, path)
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected 'key: value' lines")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _refuse_repeated_keys(node: Any, path: str | Path) -> None:
    """YAML says keys are unique, PyYAML keeps the last in silence."""
    seen: set[str] = set()
    for key, _ in getattr(node, "value", None) or () if getattr(node, "id", "") == "mapping" else ():
        name = str(key.value).replace("-", "_")
        if name in seen:
            raise ConfigError(f"{path} gives {name} more than once, line {key.start_mark.line + 1}: keep one")
        seen.add(name)


def _homes(classes: Mapping[str, type]) -> dict[str, type]:
    """Field name -> the dataclass it belongs to."""
    homes: dict[str, type] = {}
    for cls in classes.values():
        for f in dataclasses.fields(cls):
            if f.name in homes:
                raise TypeError(f"{f.name} is a field of both {homes[f.name].__name__} and {cls.__name__}")
            homes[f.name] = cls
    return homes


def _make_parser(
    classes: Mapping[str, type], prog: str | None, description: str | None, version: str | None
) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--config FILE.yaml] [flags]",
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this help and exit")
    if version is not None:
        general.add_argument("--version", action="version", version=version, help="show the version and exit")
    general.add_argument(
        "--config",
        dest="config_file",
        metavar="FILE.yaml",
        action=_Once,
        default=argparse.SUPPRESS,
        help="YAML file whose keys are the names below; flags override it",
    )
    for title, cls in classes.items():
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(cls):
            _add_flag(group, f)
    return parser


def _add_flag(group: Any, f: dataclasses.Field[Any]) -> None:
    kind = _kind(f)
    flag = "--" + f.name.replace("_", "-")
    # No defaults here: a flag overrides the file only where it is given.
    options: dict[str, Any] = {
        "dest": f.name,
        "default": argparse.SUPPRESS,
        "help": _help(f).replace("%", "%%"),
    }
    if kind == "bool":
        group.add_argument(flag, action=_Switch, **options)
    elif kind == "list":
        group.add_argument(flag, action=_Several, nargs="+", metavar="STR", **options)
    else:
        group.add_argument(flag, action=_Once, type=_reader(kind), metavar=kind.upper(), **options)


def _kind(f: dataclasses.Field[Any]) -> str:
    """'int', 'float', 'bool', 'str' or 'list' (of str)."""
    text = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
    kind = text.replace(" | None", "")
    if kind == LIST:
        return "list"
    if kind not in ("int", "float", "bool", "str"):
        raise TypeError(
            f"field {f.name} has type {text}: flags are made for int, float, bool, str and {LIST}"
        )
    return kind


def _reader(kind: str) -> Any:
    def read(text: str) -> Any:
        try:
            return {"int": int, "float": float, "str": str}[kind](text)
        except ValueError:
            wanted = {"int": "a whole number", "float": "a number"}[kind]
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {wanted}") from None

    return read


def _help(f: dataclasses.Field[Any]) -> str:
    meta, notes = f.metadata, []
    low, high, choices = meta.get("low"), meta.get("high"), meta.get("choices")
    if choices:
        notes.append("one of " + ", ".join(choices))
    if low is not None:
        notes.append(f"at least {low}" if high is None else f"{low} to {high}")
    if f.default not in (None, (), dataclasses.MISSING):
        shown = ("on" if f.default else "off") if isinstance(f.default, bool) else f.default
        notes.append(f"default: {shown}")
    return meta.get("help", "") + (f" [{'; '.join(notes)}]" if notes else "")


def _check_keys(values: Mapping[str, Any], homes: Mapping[str, type], source: str) -> None:
    for key in values:
        if key not in homes:
            close = difflib.get_close_matches(key, homes, n=1)
            hint = f", did you mean {close[0]}?" if close else f"; known keys: {', '.join(sorted(homes))}"
            raise ConfigError(f"unknown key {key!r} in {source}{hint}")


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    chosen = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
    for name, value in _floats(chosen):
        if not math.isfinite(value):
            raise ConfigError(f"{name} is {value}, expected a finite number")
    return cls(**chosen)


def _floats(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in values.items() if isinstance(value, float))
