"""Flags and YAML made from dataclasses: what is given arrives, and what is wrong is told in one line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import jinfer.serve
from jinfer import EngineConfig, ServerConfig
from jinfer.cli import parse_args, read_yaml
from jinfer.config import check_fields, option, read_lists
from jinfer.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {"engine": EngineConfig, "server": ServerConfig}


@dataclasses.dataclass(frozen=True)
class Plain:
    """One field of each kind."""

    size: int = option(3, "how many (100% of them)", low=1, high=9)
    rate: float = option(0.5, "how fast", low=0.0)
    name: str | None = option(None, "what to call it")
    color: str = option("red", "its color", choices=("red", "blue"))
    fast_path: bool = option(True, "take the short way")
    tags: tuple[str, ...] = option((), "what to stick on it")

    def __post_init__(self) -> None:
        read_lists(self)
        check_fields(self)


def parse(*argv, classes=None):
    return parse_args(classes or {"plain": Plain}, argv, prog="prog", version="prog 1")


def refused(capsys, *argv, classes=None):
    """The one line that a wrong command gets."""
    with pytest.raises(SystemExit) as leaving:
        parse(*argv, classes=classes)
    assert leaving.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("prog: error: ")
    assert err.count("\n") == 1
    return err


def test_defaults():
    assert parse() == {"plain": Plain()}
    configs = parse(classes=CLASSES)
    assert configs == {"engine": EngineConfig(), "server": ServerConfig()}


def test_flags():
    given = parse("--size", "5", "--rate=2", "--name", "x", "--color", "blue", "--no-fast-path")["plain"]
    assert given == Plain(5, 2.0, "x", "blue", False)
    assert parse("--fast-path", "--rate", "1e-3")["plain"] == Plain(rate=0.001)


@pytest.mark.parametrize(
    "argv",
    [
        ["--tags", "a", "b"],
        ["--tags", "a", "--tags", "b"],
        ["--tags=a", "--size", "3", "--tags=b"],
        ["--tags", '["a", "b"]'],
    ],
)
def test_a_flag_that_takes_several_values(argv):
    assert parse(*argv)["plain"] == Plain(tags=("a", "b"))


def test_several_values_in_a_file(tmp_path):
    file = tmp_path / "a.yaml"
    for text, tags in (("[a, b]", ("a", "b")), ("a", ("a",)), ("[]", ())):
        file.write_text(f"tags: {text}")
        assert parse("--config", str(file))["plain"] == Plain(tags=tags)
    assert parse("--config", str(file), "--tags", "c", "[x")["plain"] == Plain(tags=("c", "[x"))


@pytest.mark.parametrize(
    "argv",
    [
        ["--size", "1", "--size", "2"],
        ["--size=1", "--rate", "1", "--size=1"],
        ["--fast-path", "--no-fast-path"],
        ["--color", "red", "--color", "red"],
        ["--config", "a.yaml", "--config", "b.yaml"],
    ],
)
def test_a_flag_that_takes_one_value_is_given_once(capsys, argv):
    assert "is given more than once: keep one" in refused(capsys, *argv)


def test_every_field_of_the_server_has_a_flag():
    argv = ["--max-model-len", "64", "--served-model-name", "m", "--no-enable-prefix-caching", "--port", "0"]
    configs = parse(*argv, "--request-timeout", "5", classes=CLASSES)
    assert configs["engine"] == EngineConfig(max_model_len=64, enable_prefix_caching=False)
    assert configs["server"] == ServerConfig(served_model_name=("m",), port=0, request_timeout=5.0)


def test_a_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("size: 7\nfast-path: false  # dashes are fine\nname: null\n")
    assert parse("--config", str(file))["plain"] == Plain(size=7, fast_path=False)
    assert parse("--config", str(file), "--size", "2", "--fast-path")["plain"] == Plain(size=2)
    file.write_text("")
    assert parse("--config", str(file))["plain"] == Plain()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--size", "x"], ["--size", "'x'", "whole number"]),
        (["--size", "2.5"], ["--size", "whole number"]),
        (["--size"], ["--size", "expected one argument"]),
        (["--size", "10"], ["size is 10", "from 1 to 9"]),
        (["--rate", "fast"], ["--rate", "'fast'", "a number"]),
        (["--rate", "-1"], ["rate is -1", "at least 0"]),
        (["--rate", "nan"], ["rate", "finite"]),
        (["--rate", "inf"], ["rate", "finite"]),
        (["--color", "green"], ["color is 'green'", "red, blue"]),
        (["--fast-path=yes"], ["--fast-path"]),
        (["--sise", "5"], ["'--sise'", "did you mean --size"]),
        (["--siz", "5"], ["'--siz'"]),  # no abbreviations: the next flag may make them mean something else
        (["--config_file", "x"], ["--config_file"]),
        (["stray"], ["'stray'"]),
        (["--config", "/nowhere.yaml"], ["/nowhere.yaml", "No such file"]),
    ],
)
def test_wrong_flags(capsys, argv, words):
    line = refused(capsys, *argv)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("size: x", ["size is 'x' (str)", "expected int"]),
        ("size: '5'", ["size is '5' (str)"]),
        ("size: true", ["size is True (bool)"]),
        ("size: null", ["size is None"]),
        ("size: 99", ["from 1 to 9"]),
        ("rate: .nan", ["finite"]),
        ("fast_path: 1", ["fast_path is 1 (int)"]),
        ("name: 5", ["name is 5 (int)"]),
        ("sizes: 5", ["unknown key 'sizes'", "did you mean size"]),
        ("tags: 5", ["tags is 5 (int)", "list of text"]),
        ("tags: [5]", ["tags has 5 (int)", "text"]),
        ("tags: ['']", ["tags is empty"]),
        ("tags: null", ["tags is None"]),
        ("zzz: 5", ["unknown key 'zzz'", "color, fast_path, name, rate, size, tags"]),
        ("size: 1\nsize: 2", ["size", "more than once", "line 2"]),
        ("fast-path: true\nfast_path: true", ["fast_path", "more than once"]),
        ("- 1", ["a list", "key: value"]),
        ("just words", ["a str"]),
        ("a: [", ["not valid YAML"]),
        ("a: !!python/object/apply:os.getcwd []", ["not valid YAML"]),
        ("a: \x00", ["not valid YAML"]),
        ("[" * 5000, ["not valid YAML"]),
    ],
)
def test_wrong_files(capsys, tmp_path, text, words):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    line = refused(capsys, "--config", str(file))
    for word in words:
        assert word in line


def test_a_file_that_is_none(capsys, tmp_path):
    assert "cannot read" in refused(capsys, "--config", str(tmp_path))
    (tmp_path / "big.yaml").write_bytes(b"#" * 2_000_000)
    assert "at most" in refused(capsys, "--config", str(tmp_path / "big.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"size: \xff")
    assert "not valid YAML" in refused(capsys, "--config", str(tmp_path / "bytes.yaml"))
    with pytest.raises(ConfigError):
        read_yaml(tmp_path / "missing.yaml")


def test_options_that_contradict_each_other(capsys):
    argv = ["--max-num-seqs", "64", "--max-num-batched-tokens", "32"]
    assert "raise the one or lower the other" in refused(capsys, *argv, classes=CLASSES)


def test_help(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("--help", classes=CLASSES | {"plain": Plain})
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "engine:" in text
    assert "server:" in text
    for cls in (EngineConfig, ServerConfig, Plain):
        for f in dataclasses.fields(cls):
            assert "--" + f.name.replace("_", "-") in text
            assert " ".join(f.metadata["help"].split()) in text
    assert "how many (100% of them) [1 to 9; default: 3]" in text
    assert "[one of red, blue; default: red]" in text
    assert "--fast-path, --no-fast-path take the short way [default: on]" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("--version")
    assert leaving.value.code == 0
    assert capsys.readouterr().out == "prog 1\n"


def test_a_name_in_two_classes_is_a_mistake_of_ours():
    other = dataclasses.make_dataclass("Other", [("size", "int", 1)])
    with pytest.raises(TypeError, match="size is a field of both"):
        parse(classes={"a": Plain, "b": other})
    odd = dataclasses.make_dataclass("Odd", [("sizes", "list[int]", None)])
    with pytest.raises(TypeError, match="sizes"):
        parse(classes={"a": odd})


@pytest.mark.parametrize("preset", sorted((ROOT / "configs" / "serve").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets(preset):
    configs = parse("--config", str(preset), classes=CLASSES)
    for name, value in read_yaml(preset).items():
        assert value == getattr(configs["engine"], name, getattr(configs["server"], name, None))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--api-key", ""], "api_key is empty"),
        (["--chat-template", "/nowhere.jinja"], "cannot read the chat template"),
        (["--ssl-certfile", "/nowhere.pem"], "cannot serve HTTPS with /nowhere.pem"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
    ],
)
def test_the_server_refuses_before_it_loads_anything(argv, words):
    command = [sys.executable, "-m", "jinfer.serve", "--port", "0", *argv]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert words in run.stderr
    assert run.stderr.count("\n") == 1


def test_keys_from_the_environment(monkeypatch):
    """They do not show in the list of processes. A flag goes before them."""
    read = jinfer.serve._with_environment
    monkeypatch.delenv("JINFER_API_KEY", raising=False)
    assert read(ServerConfig()).api_key == ()
    for text, keys in (("one", ("one",)), (" one two\n", ("one", "two"))):
        monkeypatch.setenv("JINFER_API_KEY", text)
        assert read(ServerConfig()).api_key == keys
        assert read(ServerConfig(api_key=("flag",))).api_key == ("flag",)
    for text in ("", " "):
        monkeypatch.setenv("JINFER_API_KEY", text)
        with pytest.raises(ConfigError, match="JINFER_API_KEY is set and empty"):
            read(ServerConfig())


def test_flags_cost_no_heavy_imports():
    heavy = ["jax", "numpy", "fastapi", "pydantic", "transformers", "yaml", "asyncio"]
    code = f"import sys, jinfer.serve; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout == "[]\n", run.stderr
