"""Step programs: which there are, that KV is updated in place, and that nothing large is made on the way."""

import jax
import pytest

from jinfer import ModelError, load_params, programs
from jinfer.config import EngineConfig
from jinfer.programs import buckets, compiler_options, step_sizes
from jinfer.runner import Runner
from tests.support.engines import greedy, run_one, served_engine, small_engine
from tests.support.models import random_prompt

PROMPT = random_prompt(520, 21)
PAGES = 4096  # enough that a copy of the pool would be seen among the temporaries


@pytest.fixture(scope="module")
def large(tiny_llama):
    """A pool of megabytes, in front of a model of kilobytes."""
    return small_engine(tiny_llama, num_gpu_blocks_override=PAGES)


@pytest.mark.parametrize("loop", ["unroll", "scan"])
@pytest.mark.parametrize("devices", [1, 4])
def test_kv_is_updated_in_place(tiny_llama, loop, devices):
    engine = served_engine(
        tiny_llama, num_gpu_blocks_override=PAGES, layer_loop=loop, tensor_parallel_size=devices
    )
    programs = engine.runner.programs
    assert programs.kv_bytes >= 8 * 2**20
    for decode_only in (True, False):
        shape = programs.shape_for(decode_only, 4, 16)
        memory = programs.compile(programs.lower(shape)).memory_analysis()
        # Per device: its share of the pool, and the slots beside it.
        assert memory.alias_size_in_bytes >= programs.kv_bytes // devices
        assert memory.temp_size_in_bytes < programs.kv_bytes // devices // 8


def test_a_step_takes_the_pool_and_the_slots(large):
    runner: Runner = large.runner
    old = jax.tree.leaves((runner.kv, runner.slots))
    run_one(large, PROMPT, greedy(3))
    assert all(array.is_deleted() for array in old)


def test_every_batch_within_the_limits_has_a_program(large):
    programs = large.runner.programs
    shapes = set(programs.all_shapes())
    for rows in range(1, 5):
        shape = programs.shape_for(True, rows, rows)
        assert shape in shapes
        assert shape.num_rows >= rows
    for tokens in range(1, 17):
        shape = programs.shape_for(False, min(tokens, 4), tokens)
        assert shape in shapes
        assert shape.num_tokens >= tokens
        assert shape.num_rows >= min(tokens, 4)


def test_the_smallest_program_that_holds_the_batch_is_taken(tiny_llama):
    programs = small_engine(tiny_llama, max_num_seqs=8, max_num_batched_tokens=256).runner.programs
    rows = sorted(s.num_rows for s in programs.all_shapes() if s.decode_only)
    tokens = sorted(s.num_tokens for s in programs.all_shapes() if not s.decode_only)
    for count in range(1, 9):
        assert programs.shape_for(True, count, count).num_rows == min(r for r in rows if r >= count)
    for count in range(1, 257):
        assert programs.shape_for(False, 1, count).num_tokens == min(t for t in tokens if t >= count)


def test_warmup_compiles_every_program(tiny_llama):
    engine = small_engine(tiny_llama, max_num_seqs=1, max_model_len=64, warmup=True)
    assert set(engine.runner._compiled) == set(engine.runner.programs.all_shapes())


def test_an_engine_like_one_before_traces_and_compiles_nothing(tiny_llama, monkeypatch):
    def lowered(*_):
        raise AssertionError("traced again")

    options = {"max_num_seqs": 1, "max_model_len": 72, "warmup": True}
    first = run_one(small_engine(tiny_llama, **options), PROMPT, greedy(8))
    with monkeypatch.context() as patch:
        patch.setattr(programs.StepPrograms, "lower", lowered)
        assert run_one(small_engine(tiny_llama, **options), PROMPT, greedy(8)).token_ids == first.token_ids
        # Anything that a program depends on makes it another one.
        for other in ({"max_model_len": 80}, {"optimization_level": 1}, {"layer_loop": "scan"}):
            with pytest.raises(AssertionError, match="traced again"):
                small_engine(tiny_llama, **options | other)
        with jax.default_matmul_precision("bfloat16"), pytest.raises(AssertionError, match="traced again"):
            small_engine(tiny_llama, **options)


def test_programs_used_longest_ago_are_forgotten(tiny_llama, monkeypatch):
    monkeypatch.setattr(programs, "_remembered", {})
    monkeypatch.setattr(programs, "REMEMBERED", 3)
    for length in (72, 80, 72):
        small_engine(tiny_llama, max_num_seqs=1, max_model_len=length, warmup=True)
    assert len(programs._remembered) == 3
    lengths = {plan.max_model_len for _, _, plan, *_ in programs._remembered}
    assert lengths == {72, 80}
    assert list(programs._remembered)[-1][2].max_model_len == 72


@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 16), (3, 17), (32, 512), (256, 8192), (100, 100)])
def test_step_sizes_reach_the_limits_in_bounded_number(rows, tokens, is_cpu):
    config = EngineConfig(max_num_seqs=rows, max_num_batched_tokens=tokens)
    row_sizes, token_sizes = step_sizes(config, is_cpu=is_cpu)
    for sizes, most in ((row_sizes, rows), (token_sizes, tokens)):
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        assert len(sizes) <= 11
    assert row_sizes[0] == 1


def test_buckets():
    assert buckets(4, 20) == [4, 8, 16, 20]
    assert buckets(16, 16) == [16]
    assert buckets(16, 300, growth=4) == [16, 64, 256, 300]


def test_each_platform_has_its_own_way_to_say_an_optimization_level():
    assert compiler_options(None, is_cpu=False) is None
    assert compiler_options(1, is_cpu=False) == {"optimization_level": 19}
    assert compiler_options(None, is_cpu=True) == compiler_options(1, is_cpu=True)
    levels = [compiler_options(level, is_cpu=True) or {} for level in range(4)]
    assert [options["xla_backend_optimization_level"] for options in levels] == [0, 1, 2, 3]
    assert ["xla_cpu_use_fusion_emitters" in options for options in levels] == [True, True, False, False]


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(programs, "NO_EMITTERS", {"xla_cpu_option_of_another_version": False})
    assert compiler_options(0, is_cpu=True) == {"xla_backend_optimization_level": 0}


@pytest.mark.parametrize("level", [0, 3])
def test_every_optimization_level_compiles_the_same_function(tiny_llama, large, level, monkeypatch):
    if level == 3:  # all tests run without XLA's fusion emitters, see conftest.py
        everything = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
        monkeypatch.setattr(programs, "compiler_options", lambda level, is_cpu: everything)
    engine = served_engine(tiny_llama, max_num_seqs=1, optimization_level=level)
    assert run_one(engine, PROMPT, greedy(12)).token_ids == run_one(large, PROMPT, greedy(12)).token_ids


def test_weights_that_do_not_fit_change_nothing(large):
    runner, params = large.runner, load_params(str(large.folder))
    before = dict(runner.params)
    missing = {k: v for k, v in params.arrays.items() if k != "norm.weight"}
    with pytest.raises(ModelError, match=r"missing \['norm.weight'\]"):
        runner.update_weights(missing)
    with pytest.raises(ModelError, match=r"unknown \['more'\]"):
        runner.update_weights({**params.arrays, "more": params.arrays["norm.weight"]})
    misshaped = {**params.arrays, "norm.weight": params.arrays["norm.weight"][:-1]}
    with pytest.raises(ModelError, match=r"norm.weight has shape \(63,\), expected \(64,\)"):
        runner.update_weights(misshaped)
    assert all(runner.params[path] is array for path, array in before.items())


def test_weights_of_another_dtype_are_cast(large):
    runner, params = large.runner, load_params(str(large.folder))
    half = {path: array.astype("bfloat16") for path, array in params.arrays.items()}
    runner.update_weights(half)
    assert {array.dtype.name for array in runner.params.values()} == {"float32"}
    assert len(run_one(large, PROMPT, greedy(3)).token_ids) == 3
    runner.update_weights(params)
