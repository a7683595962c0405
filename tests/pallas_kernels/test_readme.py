"""The example in pallas_kernels/README.md runs as it stands, and names what there is."""

import re
from pathlib import Path

import numpy as np

from pallas_kernels.flash_attention import api as flash
from pallas_kernels.grouped_matmul import api as grouped
from pallas_kernels.paged_attention import api as paged

README = (Path(__file__).resolve().parents[2] / "pallas_kernels" / "README.md").read_text()


def test_the_example_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["scores"].shape == (2, 48, 8, 64)
    assert names["output"].shape == (4, 8, 64)
    assert np.isfinite(names["output"]).all()


def test_the_table_names_implementations_that_there_are():
    for op, api in (("paged_attention", paged), ("flash_attention", flash), ("grouped_matmul", grouped)):
        (line,) = (line for line in README.splitlines() if line.startswith(f"| `{op}` "))
        assert set(re.findall(r"`(\w+)`", line.split("|")[3])) <= set(api.REGISTRY.names)
