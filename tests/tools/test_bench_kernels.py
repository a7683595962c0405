"""Timing kernels: the method with a clock of our own, the work and its limits, and the word where no device is."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from tools.bench_kernels import __main__ as bench
from tools.bench_kernels import timing, work
from tools.kernel_cases import Case, Heads

TINY = Heads("tiny", heads=4, kv_heads=2, head_dim=16)
DECODE = Case("paged_attention", "decode", TINY, "xla", rows=3, context=64, page_size=16)
MIXED = replace(DECODE, phase="mixed", rows=4, tokens=20)
PREFILL = Case("flash_attention", "prefill", TINY, "xla", rows=1, context=32)


def test_without_an_accelerator_it_says_what_it_needs(capsys):
    assert bench.main([]) == 2
    assert "this needs a TPU or a GPU" in capsys.readouterr().err


def test_dispatch_is_not_in_the_figure(monkeypatch):
    """A clock where a step takes 3 ms and every run 1 s beside its steps."""
    now = [0.0]

    def clock():
        now[0] += 0.5
        return now[0]

    def step(x, _):
        def tick(value):
            now[0] += 0.003
            return value

        return io_callback(tick, x, x, ordered=True)

    monkeypatch.setattr(timing.time, "perf_counter", clock)
    seconds = timing.seconds_per_step(step, jnp.float32(0), shortest=1.1, repeats=3)
    assert seconds == pytest.approx(0.003)


def test_each_step_gets_what_the_last_one_gave():
    seen = []

    def step(x, constant):
        def note(value):
            seen.append(float(value))
            return value

        return io_callback(note, x, x + constant, ordered=True)

    timing.seconds_per_step(step, jnp.float32(0), constants=jnp.float32(1), shortest=0.0, repeats=1)
    assert seen[-3:] == [1.0, 2.0, 1.0]  # two steps, then the one that is taken off


def test_pairs_are_those_that_a_mask_lets_through():
    mask = np.tril(np.ones((10, 10))) - np.tril(np.ones((10, 10)), -4)
    assert work.visible_pairs(10, 10, 4) == mask.sum()
    assert work.visible_pairs(3, 10, None) == np.tril(np.ones((10, 10)))[-3:].sum()


def test_the_least_that_a_decode_step_must_do():
    least = work.least(DECODE)
    kept = 3 * 64 * 2 * 2 * 16 * 2  # rows, tokens, keys and values, KV heads, head size, bytes
    assert least.bytes == kept + 2 * 3 * 4 * 16 * 2
    assert least.flops == 4 * 3 * 64 * 4 * 16
    assert least.seconds(bandwidth=least.bytes, rate=1e30) == (1.0, "bandwidth")
    assert least.seconds(bandwidth=1e30, rate=least.flops) == (1.0, "matmul rate")


def test_a_window_lowers_what_must_be_fetched():
    windowed = replace(DECODE, heads=replace(TINY, window=16))
    assert work.least(windowed).flops == work.least(DECODE).flops / 4


@pytest.mark.parametrize(
    "case", [DECODE, MIXED, PREFILL, replace(DECODE, kv_dtype="int8")], ids=lambda c: c.name
)
def test_the_work_runs_and_feeds_itself(case):
    made = work.make(case)
    out = jax.jit(made.step)(made.carry, made.constants)
    assert (out.shape, out.dtype) == (made.carry.shape, made.carry.dtype)
    assert np.isfinite(np.asarray(out, np.float32)).all()


def test_every_row_of_a_mixed_step_is_there():
    queries = work.row_queries(MIXED)
    assert queries == [1, 1, 9, 9]
    batch = work.make_batch(MIXED)
    assert int(batch.num_decode_rows) == 2
    assert sorted(np.asarray(batch.page_table).ravel()) == list(range(1, 17))


def test_jax_does_the_same_work():
    ours, (name, theirs) = work.make(PREFILL), work.alternative(PREFILL)
    assert name == "jax.nn.dot_product_attention (xla)"
    with jax.numpy_dtype_promotion("standard"):  # jax's own function mixes dtypes
        got, wanted = (np.asarray(jax.jit(w.step)(w.carry, w.constants), np.float32) for w in (ours, theirs))
    np.testing.assert_allclose(got, wanted, atol=0.03)


def test_a_kernel_that_fails_does_not_hide_the_others(monkeypatch):
    monkeypatch.setattr(work, "make", lambda case: 1 / 0)
    line, passed = bench.measure(PREFILL, 1e9, 1e12)
    assert not passed
    assert "failed: ZeroDivisionError" in line


def test_a_line_tells_the_share_of_the_limit(monkeypatch):
    monkeypatch.setattr(timing, "seconds_per_step", lambda *_, **__: 2.0)
    limit = work.least(PREFILL).flops
    line, passed = bench.measure(PREFILL, 1e30, limit)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert passed
    assert cells[2:4] == ["1,000,000 us, matmul rate", "50%"]
    assert cells[4:] == ["jax.nn.dot_product_attention (xla)", "2,000,000", "1.00"]


def test_every_case_of_the_table_can_be_counted():
    for platform in ("tpu", "gpu"):
        assert all(work.least(case).bytes > 0 for case in work.cases(platform))
