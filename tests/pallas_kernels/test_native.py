"""The native CPU kernels: compiled, kept, refused, and right."""

import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.native import library

needs_compiler = pytest.mark.skipif(native.load() is not None, reason=str(native.load()))


def numbers(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@needs_compiler
@pytest.mark.parametrize("k", [1, 15, 16, 17, 64, 200, 768])
@pytest.mark.parametrize(
    ("m", "n"), [(1, 1), (1, 7), (2, 48), (3, 50), (4, 96), (9, 61), (32, 200), (131, 300)]
)
def test_matmul(m, n, k):
    x, weight = numbers(1, m, k), numbers(2, n, k)
    wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    got = jax.jit(native.matmul)(weight, x)
    np.testing.assert_allclose(got, wanted, atol=1e-6 * k**0.5 * 4, rtol=1e-5)


@needs_compiler
def test_a_product_larger_than_the_cache_and_shared_between_threads():
    x, weight = numbers(1, 96, 3000), numbers(2, 2000, 3000)
    wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    for _ in range(20):
        np.testing.assert_allclose(jax.jit(native.matmul)(weight, x), wanted, atol=1e-3, rtol=1e-5)


@needs_compiler
def test_a_row_is_the_same_whatever_stands_beside_it():
    x, weight = numbers(1, 37, 768), numbers(2, 500, 768)
    together = np.asarray(jax.jit(native.matmul)(weight, x))
    for row in (0, 3, 36):
        np.testing.assert_array_equal(native.matmul(weight, x[row : row + 1])[0], together[row])
    np.testing.assert_array_equal(native.matmul(weight, x[5:10]), together[5:10])


@needs_compiler
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 15, 16, 33, 768])
def test_rms_norm(size, offset):
    x, weight = numbers(1, 5, size) * 3, numbers(2, size)
    wide = np.asarray(x, np.float64)
    wanted = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * (np.asarray(weight) + offset)
    np.testing.assert_allclose(
        native.rms_norm(x, weight, eps=1e-5, offset=offset), wanted, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.matmul(numbers(1, 3, 4), numbers(1, 2, 5)), r"\[N, K\] and \[M, K\]"),
        (
            lambda: native.matmul(numbers(1, 3, 4).astype(jnp.bfloat16), numbers(1, 2, 4)),
            "weight has dtype bfloat16",
        ),
        (lambda: native.rms_norm(numbers(1, 3, 4), numbers(1, 5), eps=1e-5), r"\[M, E\] and \[E\]"),
        (
            lambda: native.rms_norm(numbers(1, 3, 4).astype(jnp.bfloat16), numbers(1, 4), eps=1e-5),
            "x has dtype",
        ),
    ],
)
def test_a_shape_or_dtype_outside_the_contract_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("made") / "kernels.so"
    library.compile_library(file)
    return file


@pytest.fixture
def loading(tmp_path, monkeypatch, made):
    """`load` as in a new process with an empty cache, the folder of its files, and the files that it compiled."""
    compiled: list[Path] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        library, "compile_library", lambda file: compiled.append(file) or shutil.copy(made, file)
    )
    # XLA takes a name once per process, and has these already.
    monkeypatch.setattr(library.jax.ffi, "register_ffi_target", lambda *_, **__: None)
    return library.load.__wrapped__, tmp_path / "pallas_kernels", compiled


@needs_compiler
def test_the_library_is_compiled_once_and_kept(loading, monkeypatch):
    load, folder, compiled = loading
    registered = []
    monkeypatch.setattr(
        library.jax.ffi, "register_ffi_target", lambda name, *_, **__: registered.append(name)
    )
    assert load() is None
    assert load() is None
    assert len(compiled) == 1
    (kept,) = folder.iterdir()
    assert kept.suffix == ".so"
    assert registered == 2 * list(library.TARGETS)


def replace(file: Path, data: bytes) -> None:
    """A file of its own: the old one is mapped into this process, which a change in place would kill."""
    file.unlink()
    file.write_bytes(data)


@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "cut off", "one byte", "others may write", "not loadable"])
def test_a_damaged_library_is_compiled_again_with_one_warning(loading, caplog, damage):
    load, folder, compiled = loading
    assert load() is None
    (kept,) = folder.iterdir()
    good = kept.read_bytes()
    if damage == "others may write":
        kept.chmod(0o777)
    elif damage == "not loadable":  # whole, but made for another C library
        kept.unlink()
        other = b"no library at all"
        (folder / library._name(kept.name.split("-")[1], other)).write_bytes(other)
    else:
        half = len(good) // 2
        replace(
            kept, {"empty": b"", "cut off": good[:half]}.get(damage, good[:half] + b"?" + good[half + 1 :])
        )
    assert load() is None
    assert len(compiled) == 2
    assert len(caplog.records) == 1
    (again,) = folder.iterdir()
    assert len(again.read_bytes()) == len(good)
    assert load() is None
    assert len(compiled) == 2
    assert len(caplog.records) == 1


@needs_compiler
def test_where_no_cache_can_be_had_nothing_is_left_behind(loading, monkeypatch):
    load, folder, compiled = loading
    monkeypatch.setattr(library.userfiles, "cache_folder", lambda name: None)
    assert load() is None
    assert len(compiled) == 1
    assert not compiled[0].exists()
    assert not compiled[0].parent.exists()
    assert not folder.exists()


@needs_compiler
def test_a_cache_on_a_full_disk_is_done_without(loading, monkeypatch):
    load, folder, _ = loading
    compile_library = library.compile_library

    def full(file: Path) -> None:
        if file.is_relative_to(folder):
            raise subprocess.SubprocessError("cc failed: No space left on device")
        compile_library(file)

    monkeypatch.setattr(library, "compile_library", full)
    assert load() is None
    assert list(folder.iterdir()) == []


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "COMPILERS", ("no-such-compiler",))
    assert "no C compiler found" in str(library.load.__wrapped__())


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    (tmp_path / "kernels.c").write_text("this is not C")
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    with pytest.raises((subprocess.SubprocessError, OSError), match=r"failed|no C compiler"):
        library.compile_library(tmp_path / "made.so")
