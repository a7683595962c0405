"""The native CPU kernels: compiled, kept, refused, and right."""

import subprocess

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


@needs_compiler
def test_the_library_is_compiled_once_and_kept(tmp_path, monkeypatch):
    compiled, registered = [], []
    compile_library = library.compile_library
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        library, "compile_library", lambda file: compiled.append(file) or compile_library(file)
    )
    # XLA takes a name once per process, and has these already.
    monkeypatch.setattr(
        library.jax.ffi, "register_ffi_target", lambda name, *_, **__: registered.append(name)
    )
    load = library.load.__wrapped__
    assert load() is None
    assert load() is None
    assert len(compiled) == 1
    assert compiled[0].parent == tmp_path / "pallas_kernels"
    assert registered == 2 * list(library.TARGETS)


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "COMPILERS", ("no-such-compiler",))
    assert "no C compiler found" in str(library.load.__wrapped__())


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    (tmp_path / "kernels.c").write_text("this is not C")
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    with pytest.raises((subprocess.SubprocessError, OSError), match=r"failed|no C compiler"):
        library.compile_library(tmp_path / "made.so")


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "pallas_kernels").mkdir()
    (tmp_path / "pallas_kernels").chmod(0o777)
    assert library.cache_folder() != tmp_path / "pallas_kernels"
