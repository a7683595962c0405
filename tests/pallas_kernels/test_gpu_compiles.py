"""The GPU kernels compiled for real, for devices that are not there: no spills, wgmma and TMA in the machine code."""

import pytest

from tools import targets
from tools.kernel_cases import Case, read_heads
from tools.kernel_report.gpu import measure

H200 = next(target for target in targets.GPU_TARGETS if target.name == "H200")
pytestmark = pytest.mark.skipif(H200.missing() is not None, reason=f"{H200.missing()} (extra gpu-compile)")

CASES = [
    ("paged_attention", "decode", {"paged_attention_decode", "paged_attention_join"}),
    ("paged_attention", "mixed", {"paged_attention_prompts"}),  # its decode kernels are the first case's
    ("flash_attention", "prefill", {"flash_attention"}),
]


@pytest.mark.parametrize(("op", "phase", "kernels"), CASES)
def test_compiles_for_a_gpu_that_is_not_there(op, phase, kernels, tmp_path):
    case = Case(op, phase, read_heads("llama-3-8b"), "gpu", rows=8, context=2048)
    rows = measure(case, H200, tmp_path)
    assert {row.kernel for row in rows} == kernels
    for row in rows:
        assert row.spilled_bytes == 0, row
        if not row.kernel.startswith("paged_attention_join"):
            assert row.hgmma > 0, row
            assert row.tma_loads > 0, row
            assert row.shared_bytes is not None, row
            assert row.shared_bytes <= 227 * 1024, row
