"""Reading what compilers say of a kernel: on text made to order, and on jax's own kernel, whose cost is published."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from tools import targets
from tools.kernel_cases import Case, Heads, read_heads
from tools.kernel_report import __main__ as report
from tools.kernel_report import bundles, gpu, tpu
from tools.kernel_report.cases import default_cases
from tools.kernel_report.cost import bytes_per_token, cost_of

V6E = next(target for target in targets.TPU_TARGETS if target.name == "v6e")
SHAPE = Heads("made up", heads=4, kv_heads=1, head_dim=128)
CASE = Case("paged_attention", "decode", SHAPE, "tpu")

# One loop over blocks: it asks for the next block when there is one, waits, and takes one of two branches.
PROGRAM = """
control target key start
LB: loop body

     0   :  { %s0 = smov 0 }
   0x1   :  { %5 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1, /*size_in_granules=*/2048, /*vmem=*/%s2 }
   0x2 LB: > { %s3 = sphi %s0, %s4 }
   0x3   : > { %9 = sbr.rel (%p1) target = $region7 }
   0x4   :  {}
   0x5   : > { %1 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1, /*size_in_granules=*/1024, /*vmem=*/%s2  ;;  %2 = \
dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1, /*size_in_granules=*/1024, /*vmem=*/%s2 }
   0x6   : > { %5 = shalt.err (!%p2) /* BoundsCheck 3 for %1 = dma.hbm_to_vmem [thread:$0]  /*size_in_granules=*/1024
hlo: kernel
 */ }
   0x7 PF: > { %s5 = sld [smem:[#allocation7]] } /* Start/End empty region 7 */
   0x8   : > { %6 = dma.done.wait [#allocation7], 2048 }
   0x9   : > { %9 = sbr.rel (%p3) target = $region8 }
   0xa   : > { %v1 = vmatmul.mubr.bf16.gmra.mxu0 %v2  ;;  %v3 = vmatmul.mubr.bf16.gmra.mxu1 %v4 }
   0xb   : > { %v1 = vadd.f32 %v2, %v3 }
   0xc PF: > { %s6 = sadd.s32 1, %s5 } /* Start/End empty region 8 */
   0xd   : > { %9 = sbr.rel (%p4) target = $region9 }
   0xe   : > { %v1 = vmatmul.mubr.f32.gmra.mxu0 %v2 }
   0xf PF: > { %7 = sbr.rel (!%p5) target = $region2 } /* Start/End empty region 9 */
  0x10   :  { %s7 = smov 1 }
""".strip().splitlines()
UNITS = ["MXU", "VALU", "VLOAD:FILL", "VSTORE:SPILL"]


def utilization_of(lines):
    count = sum("0x" in line or line.startswith("     0 ") for line in lines)
    used = ["2 1 0 1" if index == 0xA else "0 1 0 0" for index in range(count)]
    head = ["== CAPACTIY:", ", ".join(UNITS), "  2  4  3  2", "== UTILIZATION:"]
    return bundles.parse_utilization([*head, *used])


@pytest.fixture
def root():
    return bundles.parse_bundles(PROGRAM, utilization_of(PROGRAM))


def test_loops_and_branches_are_found(root):
    assert root.total("bundles") == 17
    (loop,) = root.inner
    assert (loop.is_loop, loop.start, loop.end, loop.total("bundles")) == (True, 2, 16, 14)
    assert [(inner.start, inner.end, inner.is_loop) for inner in loop.inner] == [
        (4, 7, False),
        (10, 12, False),
        (14, 15, False),
    ]


def test_an_empty_bundle_belongs_to_the_loop_around_it(root):
    assert root.bundles == 3
    assert root.inner[0].inner[0].bundles == 3


def test_text_of_checks_is_neither_a_bundle_nor_a_fetch(root):
    branch = root.inner[0].inner[0]
    assert (branch.fetches, branch.fetched_granules) == (2, 2048)


def test_matmul_rows_depend_on_the_type(root):
    assert [region.matmul_rows for region in root.inner[0].inner] == [0, 32, 8]


@pytest.mark.parametrize(
    ("instruction", "rows"),
    [
        ("vmatmul.bf16.gmra.mxu3", 16),
        ("vmatmul.f32.vlgmr.msrb.gmra.mxu0", 8),
        ("vmatmul.mubr.bf16.vlgmr.msra.gmra.mxu1", 16),
        ("vmatmul.msk.bf16.gmra.mxu1", 16),
        ("vmatmul.mubr.s8.gmra.mxu0", 32),
        ("vmatprep.mubr.bf16.mxu0", 0),
    ],
)
def test_each_generation_has_its_own_names_for_a_matrix_product(instruction, rows):
    root = bundles.parse_bundles([f"   0x1   :  {{ %v1 = {instruction} %v2 }}"])
    assert root.matmul_rows == rows


def test_a_steady_pass_fetches_and_takes_the_busier_branch(root):
    parts = bundles.steady_pass(bundles.hot_loop(root))
    assert [part.start for part in parts] == [2, 10, 4]


def test_of_equally_busy_branches_the_shorter_one_is_taken():
    doubled = [
        line.replace("vmatmul.mubr.f32.gmra.mxu0 %v2", "vmatmul.mubr.bf16.x ;;  %v = vmatmul.mubr.bf16.y")
        for line in PROGRAM
    ]
    parts = bundles.steady_pass(bundles.hot_loop(bundles.parse_bundles(doubled)))
    assert 14 in [part.start for part in parts]


def test_cost_of_a_block(root):
    cost = cost_of(root, utilization_of(PROGRAM), CASE, V6E)
    assert (cost.bundles, cost.all_bundles) == (13, 14)
    assert cost.fetched_bytes == 2048 * 32
    assert cost.tokens == 2048 * 32 / (2 * 128 * 2)
    assert cost.fetch_cycles == pytest.approx(65536 / (1.64e12 / 1.75e9))
    assert cost.per_tokens(1024) == pytest.approx(13 * 1024 / 128)
    assert cost.pairs == 32 * 256 / 2
    assert cost.in_flight
    assert cost.spills == pytest.approx(1 / 13)
    # 32 rows through one of two units that take two rows a cycle each.
    assert cost.mxu_share == pytest.approx(32 / 4 / 13, rel=0.01)


def test_a_kernel_that_waits_before_it_asks_is_told():
    lines = [*PROGRAM]
    wait = next(line for line in lines if "dma.done" in line)
    lines[lines.index(wait)] = "   0x8   : > { %s = smov 0 }"
    first = next(i for i, line in enumerate(lines) if "LB: >" in line)
    lines[first] = lines[first].replace("{ ", "{ %6 = dma.done.wait [#allocation7], 2048  ;;  ")
    root = bundles.parse_bundles(lines)
    assert bundles.fetches_ahead(root, bundles.hot_loop(root)) is False


def test_nested_loops_are_apart():
    lines = [
        "     0   :  { %s0 = smov 0 }",
        "   0x1 LB: > { %s1 = smov 0 }",
        "   0x2 LB: >> { %v1 = vmatmul.mubr.bf16.gmra.mxu0 %v2 }",
        "   0x3   :  {}",
        "   0x4 LB: >> { %s2 = smov 0 }",
        "   0x5   : > { %s3 = smov 0 }",
        "   0x6   :  { %s4 = smov 0 }",
    ]
    root = bundles.parse_bundles(lines)
    (outer,) = root.inner
    assert [(loop.start, loop.total("bundles")) for loop in outer.inner] == [(2, 2), (4, 1)]
    assert outer.bundles == 2
    assert bundles.hot_loop(root) is outer.inner[0]


def test_files_of_two_programs_are_refused():
    with pytest.raises(ValueError, match="17 bundles and 16 lines of utilization"):
        bundles.parse_bundles(PROGRAM, utilization_of(PROGRAM[:-1]))
    with pytest.raises(ValueError, match="no bundles in the dump"):
        bundles.parse_bundles(["nothing"])
    with pytest.raises(ValueError, match="no unit names"):
        bundles.parse_utilization(["nothing"])


def test_a_missing_kernel_names_those_that_are_there(tmp_path):
    (tmp_path / "17-other.1-72-final_bundles.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no kernel 'mine' in the dump; there are other.1"):
        bundles.read_kernel(tmp_path, "mine")


def test_head_sizes_count_as_the_chip_pads_them():
    assert bytes_per_token(replace(CASE, heads=replace(SHAPE, head_dim=96))) == bytes_per_token(CASE) == 512
    assert bytes_per_token(replace(CASE, kv_dtype="int8")) == 256
    latent = replace(CASE, heads=replace(SHAPE, head_dim=576, value_dim=512))
    assert bytes_per_token(latent) == 640 * 2  # once


def test_a_narrow_value_takes_fewer_passes(root):
    heads = replace(SHAPE, head_dim=576, value_dim=512)  # three units of 256 deep for q k^T, two wide for p v
    cost = cost_of(root, utilization_of(PROGRAM), replace(CASE, heads=heads), V6E)
    assert cost.pairs == 32 * 256 // 5


def test_the_table_has_a_cell_for_every_column(root):
    row = tpu.Row(CASE, "kernel", cost_of(root, utilization_of(PROGRAM), CASE, V6E))
    assert len({line.count("|") for line in tpu.table([row]).splitlines()}) == 1


def test_what_ptxas_and_the_disassembler_say(tmp_path):
    (tmp_path / "kernel_0.ptxas").write_text(
        "ptxas info : 16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info : Used 168 registers, used 4 barriers, 1 bytes smem\n"
    )
    with pytest.raises(ValueError, match=r"kernel_0.ptxas has no disassembly"):
        gpu.read_dump(CASE, tmp_path / "kernel_0.ptxas")
    (tmp_path / "kernel_0.mlir-passes.log").write_text("gpu.launch dynamic_shared_memory_size %c229440_i32 {")
    (tmp_path / "kernel_0.sass_ctrl").write_text("HGMMA.64x128x16 R4\nUTMALDG.2D [UR4]\nUTMALDG.3D\nHGMMAX\n")
    (tmp_path / "kernel_01.sass_ctrl").write_text("HGMMA.64x128x16 R4\n")
    row = gpu.read_dump(CASE, tmp_path / "kernel_0.ptxas")
    assert (row.registers, row.spilled_bytes, row.shared_bytes) == (168, 20, 229440)
    assert (row.hgmma, row.tma_loads, row.tma_stores) == (1, 2, 0)
    assert "| kernel | 168 | 20 | 229,440 | 1 | 2 | 0 |" in gpu.table([row])


def test_every_case_has_jaxs_beside_it_on_tpu_only():
    assert {case.implementation for case in default_cases("tpu")} == {"tpu", "jax"}
    assert {case.implementation for case in default_cases("gpu")} == {"gpu"}
    latents = [case for case in default_cases("tpu") if case.heads.shared_values]
    assert {(case.heads.heads, case.phase) for case in latents} == {
        (4, "decode"),
        (4, "mixed"),
        (32, "decode"),
        (32, "mixed"),
    }
    assert {case.implementation for case in latents} == {"tpu"}
    assert not any(case.heads.shared_values for case in default_cases("gpu"))


def test_an_unknown_target_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown target 'v7': use one of v5e, v5p, v6e"):
        report.main(["--target", "v7"])


def test_a_missing_compiler_is_said(monkeypatch, capsys):
    monkeypatch.setattr(targets.TPUTarget, "missing", lambda self: "libtpu is not installed")
    assert report.main(["--target", "v6e"]) == 1
    assert "v6e: nothing compiled, libtpu is not installed" in capsys.readouterr().err


@pytest.mark.tpu_compile
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_published_cost_of_jaxs_kernel_is_found(tmp_path: Path):
    """2,021 bundles for a decode block of 512 tokens on v6e, with the loop around the block's own."""
    case = Case("paged_attention", "decode", read_heads("llama-3-8b"), "jax")
    (row,) = tpu.measure(case, V6E, tmp_path)
    root, _ = bundles.read_kernel(tmp_path, row.kernel)
    hot = bundles.hot_loop(root)
    around = min(
        (r for r in root.walk() if r.is_loop and r is not hot and any(x is hot for x in r.walk())),
        key=lambda r: r.total("bundles"),
    )
    assert around.total("bundles") == pytest.approx(
        2021, rel=0.05
    )  # each libtpu schedules a little differently
    assert row.cost.tokens == 512
    assert row.cost.in_flight
