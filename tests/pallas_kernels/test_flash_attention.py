"""The contract of dense attention, and the XLA path against the float32 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import flash_attention as fa
from pallas_kernels.dispatch import ImplementationError
from pallas_kernels.flash_attention import xla

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def make(
    batch=2, length=37, heads=4, kv_heads=2, head_dim=16, dtype="float32", seed=0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(random.standard_normal((batch, length, h, head_dim)), dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    return q, k, v


def compare(implementation, q, k, v, lengths, **options):
    """Both finite everywhere, and equal where tokens live. The reference sees the same numbers in float32."""
    options["scale"] = q.shape[3] ** -0.5
    lengths = jnp.asarray(lengths, jnp.int32)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    wanted = np.asarray(fa.attend(*wide, lengths=lengths, implementation="reference", **options))
    got = np.asarray(
        fa.attend(q, k, v, lengths=lengths, implementation=implementation, **options), np.float32
    )
    live = np.arange(q.shape[1]) < np.asarray(lengths)[:, None]
    assert np.isfinite(got).all()
    np.testing.assert_allclose(
        got[live], wanted[live], atol=TOLERANCE[q.dtype.name], rtol=1e-2 * (q.dtype != jnp.float32)
    )


def test_the_reference_is_softmax_attention():
    q, k, v = make(batch=1, length=5, heads=2, kv_heads=1, head_dim=8)
    got = fa.attend(q, k, v, scale=0.3, implementation="reference")
    for token in range(5):
        for head in range(2):
            logits = 0.3 * np.asarray(k[0, : token + 1, 0]) @ np.asarray(q[0, token, head])
            weights = np.exp(logits - logits.max())
            wanted = (weights / weights.sum()) @ np.asarray(v[0, : token + 1, 0])
            np.testing.assert_allclose(got[0, token, head], wanted, atol=1e-6)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(xla, "TILE", 8)
    monkeypatch.setattr(xla, "BLOCK", 16)
    jax.clear_caches()
    yield
    jax.clear_caches()


# Few, since each is compiled: what hypothesis draws is what is not static.
KINDS = [
    (True, None, None, False),
    (True, 5, 2.0, True),
    (False, None, 2.0, True),
    (False, 30, None, False),
]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 37), min_size=2, max_size=2), kind=st.sampled_from(KINDS))
def test_xla_equals_the_reference(lengths, kind):
    check_xla(make(), lengths, *kind)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3, 20])
def test_xla_in_many_blocks_equals_the_reference(small_blocks, causal, window):
    for lengths in ([37, 1], [16, 0], [17, 36]):
        check_xla(make(), lengths, causal, window, 2.0, True)


def check_xla(arrays, lengths, causal, window, soft_cap, sinks):
    sinks = jnp.linspace(-1.0, 2.0, arrays[0].shape[2], dtype=jnp.float32) if sinks else None
    q, k, v = arrays
    compare("xla", q, k, v, lengths, causal=causal, sliding_window=window, soft_cap=soft_cap, sinks=sinks)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (7, 1, 80), (6, 2, 96)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_takes_any_ratio_of_heads_and_both_dtypes(heads, kv_heads, head_dim, dtype):
    q, k, v = make(1, 20, heads, kv_heads, head_dim, dtype)
    compare("xla", q, k, v, [20])


def test_what_stands_behind_a_sequence_does_not_reach_it():
    q, k, v = make(batch=1)
    wanted = fa.attend(q[:, :20], k[:, :20], v[:, :20], scale=0.25, causal=False, implementation="xla")
    k, v = (x.at[:, 20:].set(jnp.nan) for x in (k, v))
    got = fa.attend(
        q, k, v, scale=0.25, causal=False, lengths=jnp.asarray([20], jnp.int32), implementation="xla"
    )
    np.testing.assert_allclose(got[:, :20], wanted, atol=1e-6)


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporaries(length):
        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        run = jax.jit(lambda q, k, v: fa.attend(q, k, v, scale=0.25, implementation="xla"))
        memory = run.lower(shape, shape, shape).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries(16384) < 6 * temporaries(4096)


def test_automatic_choice_on_cpu_is_xla():
    q, k, v = make()
    automatic, named = (fa.attend(q, k, v, scale=0.25, implementation=name) for name in ("auto", "xla"))
    np.testing.assert_array_equal(automatic, named)


BAD = [
    ({"q": jnp.zeros((2, 37, 4))}, "q has shape .2, 37, 4.: it must be .batch, tokens, heads, head_dim."),
    ({"k": jnp.zeros((2, 36, 2, 16))}, "k has shape .2, 36, 2, 16.: with q of .* must be .2, 37, KV heads, 16."),
    ({"v": jnp.zeros((2, 37, 1, 16))}, "v has shape .* must be k's"),
    ({"k": jnp.zeros((2, 37, 3, 16)), "v": jnp.zeros((2, 37, 3, 16))}, "q has 4 heads: it must be a multiple of k's 3"),
    ({"q": jnp.zeros((2, 37, 4, 16), jnp.float16)}, "q has dtype float16: it must be one of"),
    ({"v": jnp.zeros((2, 37, 2, 16), jnp.bfloat16)}, "v has dtype bfloat16: it must be q's, float32"),
    ({"lengths": jnp.zeros((3,), jnp.int32)}, r"lengths is int32\[3\]: it must be int32\[2\]"),
    ({"lengths": jnp.zeros((2,), jnp.float32)}, r"lengths is float32\[2\]: it must be int32\[2\]"),
    ({"sliding_window": 0}, "sliding_window is 0: it must be at least 1"),
    ({"soft_cap": -1.0}, "soft_cap is -1.0: it must be above 0"),
    ({"sinks": jnp.zeros((2,))}, "sinks has shape .2,.: it must be .4,."),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_what_is_outside_the_contract_is_refused(change, message):
    q, k, v = make()
    arguments = {"q": q, "k": k, "v": v, "scale": 0.25, **change}
    with pytest.raises(ValueError, match=message):
        fa.attend(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ImplementationError, match="flash_attention: unknown implementation 'cuda'"):
        fa.attend(*make(), scale=0.25, implementation="cuda")
