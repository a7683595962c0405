"""Compiled programs on disk: damaged ones are made again, those that others could have written are not run."""

import logging
import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache

from jinfer import EngineConfig, compile_cache, platform
from jinfer.compile_cache import ProgramCache
from pallas_kernels import userfiles

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache in an empty folder, and jax set to keep everything in it."""
    monkeypatch.setattr(compilation_cache, "_cache", None)
    assert compile_cache.install(tmp_path)
    before = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield tmp_path
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def run_program() -> None:
    """Compiles the same program as the last call, for jax does not know this function yet."""
    program = jax.jit(lambda x: jnp.sin(x) * 3 + 1)
    assert float(program(jnp.float32(0))) == 1.0


def entry(folder: Path) -> Path:
    (file,) = folder.glob("jit__lambda-*-cache")
    return file


@pytest.fixture
def compiled(monkeypatch):
    """Every write to the cache follows a compilation: the keys that were written."""
    keys = []
    put = ProgramCache.put
    monkeypatch.setattr(
        ProgramCache, "put", lambda self, key, value: (keys.append(key), put(self, key, value))
    )
    return keys


def test_a_program_is_compiled_once(cache, compiled, caplog):
    run_program()
    first = len(compiled)
    assert first
    run_program()
    assert len(compiled) == first
    assert caplog.records == []
    assert [file for file in cache.iterdir() if not file.name.endswith("-cache")] == []


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


DAMAGES = {
    "cut off": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "one byte": flip,
    "garbage": lambda file: file.write_bytes(b"garbage" * 100),
    "well packed garbage": lambda file: file.write_bytes(zlib.compress(b"garbage" * 100)),
    "others may write": lambda file: file.chmod(0o666),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
def test_a_bad_entry_is_made_again_with_one_warning(cache, compiled, caplog, damage):
    run_program()
    file = entry(cache)
    good = file.read_bytes()
    DAMAGES[damage](file)
    compiled.clear()
    run_program()
    assert len(compiled) == 1
    if damage != "well packed garbage":  # jax finds that one, and warns itself
        assert [record.levelname for record in caplog.records if record.name.startswith("jinfer")] == [
            "WARNING"
        ]
        assert str(file) in caplog.text
    if damage == "a folder":
        return
    assert zlib.decompress(file.read_bytes())[4:100] == zlib.decompress(good)[4:100]
    caplog.clear()
    compiled.clear()
    run_program()
    assert compiled == []
    assert caplog.records == []


def test_an_entry_of_another_user_is_not_run(cache, compiled, caplog, monkeypatch):
    run_program()
    compiled.clear()
    monkeypatch.setattr(userfiles, "is_safe", lambda found: False)
    run_program()
    assert len(compiled) == 1
    assert "belongs to user" in caplog.text


def test_many_bad_entries_are_one_warning(tmp_path, caplog):
    cache = ProgramCache(tmp_path, zlib.decompress)
    for i in range(12):
        (tmp_path / f"k{i}-cache").touch()
    assert [cache.get(f"k{i}") for i in range(12)] == [None] * 12
    assert len(caplog.records) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_warning_and_leaves_no_halves(tmp_path, caplog, monkeypatch):
    def full(file: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(userfiles, "write", full)
    cache = ProgramCache(tmp_path, zlib.decompress)
    for i in range(12):
        cache.put(f"k{i}", b"data")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text


def test_jaxs_own_settings_of_its_cache_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_cache", None)
    before = jax.config.values["jax_compilation_cache_max_size"]
    jax.config.update("jax_compilation_cache_max_size", 10**9)
    try:
        assert not compile_cache.install(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_max_size", before)


@pytest.fixture
def without_a_cache(monkeypatch):
    """jax as in a process that has no cache yet."""
    monkeypatch.setattr(compilation_cache, "_cache", None)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("without_a_cache")
def test_a_folder_that_others_write_to_is_refused_and_the_engine_goes_on(tmp_path, caplog):
    tmp_path.chmod(0o777)
    platform.prepare_platform(EngineConfig(compilation_cache_dir=str(tmp_path)))
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert "mode 777" in caplog.text
    assert "chmod 700" in caplog.text


@pytest.mark.usefixtures("without_a_cache")
def test_where_nothing_can_be_written_a_line_says_so(caplog, monkeypatch):
    monkeypatch.setattr(userfiles, "cache_folder", lambda name: None)
    platform.prepare_platform(EngineConfig())
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "compilation_cache_dir" in caplog.text


def test_a_disk_that_fills_up_while_an_engine_starts(tmp_path):
    """With a limit on the size of files: the first run keeps what fits, the next finds no halves."""
    code = """
import resource, sys
import jax, jax.numpy as jnp
from jinfer import EngineConfig
from jinfer.platform import prepare_platform
prepare_platform(EngineConfig(compilation_cache_dir=sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
for i in range(3):
    jax.jit(lambda x: jnp.sin(x) * i + 1)(1.0)
"""

    def run(limit: int) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, str(tmp_path), str(limit)],
            cwd=ROOT, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stderr

    assert run(1000).count("cannot be kept") == 1
    assert list(tmp_path.iterdir()) == []
    assert run(-1) == ""
    assert len(list(tmp_path.iterdir())) >= 3
