"""Compiles one case for one target with the compiler's notes on; run by `tools.targets.run_child`.

JSON request on stdin: `target`, `case`. Answer: the names of the program's own kernels, seconds, bytes of temporaries.
"""

from __future__ import annotations

import json
import re
import sys
import time

# `%name = bf16[...] custom-call(...), custom_call_target="tpu_custom_call"`
_KERNEL = re.compile(
    r"^\s*(?:ROOT )?%([\w.\-]+) = .*custom_call_target=\"(?:tpu_custom_call|mosaic_gpu[\w.]*)\"", re.M
)


def main() -> int:
    request = json.load(sys.stdin)
    from tools import targets
    from tools.kernel_cases import Case, lower

    target = targets.find(request["target"])
    case = Case.from_request(request["case"])
    start = time.monotonic()
    compiled = lower(case, target.devices()).compile()
    memory = compiled.memory_analysis()
    answer = {
        "kernels": _KERNEL.findall(compiled.as_text()),
        "seconds": time.monotonic() - start,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
