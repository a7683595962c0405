"""Every kernel at the shapes of real models, for one target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tools.kernel_cases import Case, Heads, implementations, read_heads
from tools.targets import GPUTarget, Target, ask_child

HEADER = "| target | kernel, implementation | compiles | seconds | temporaries MB |\n|---|---|---|---|---|"
HOPPER = 9  # the generation whose wgmma the GPU kernels use
# Models that one device does not hold, or that are served by several: heads as one device of so many has them.
SPLIT = {"llama-3-70b": 8, "deepseek-v2-lite": 4, "deepseek-v3": 4}
# Quantized KV beside bf16 on TPU: the GPU kernels read bf16 pages alone.
QUANTIZED = ("llama-3-8b", "deepseek-v2-lite")


@dataclass(frozen=True)
class Result:
    """`answer` is the child's: see `tools.compile_check.child`."""

    target: str
    case: Case
    answer: dict[str, Any]

    @property
    def problem(self) -> str | None:
        """What is wrong, or None."""
        if self.answer["error"]:
            return self.answer["error"]
        if not self.answer["kernels"] and self.case.implementation != "xla":
            return "the program holds no kernel"
        if self.answer["alias_bytes"] < self.answer["kv_bytes"]:
            return "the KV pool is copied"
        return None

    @property
    def passed(self) -> bool:
        return self.problem is None


def cases(target: Target, models: list[str], ops: str | None = None) -> list[Case]:
    """Decode, mixed and prefill of each model; for some of them on TPU quantized KV beside bf16.

    Where the op has no kernel for the target, the XLA path that it then takes is compiled. Latent attention has no
    dense form: its keys are only ever kept in pages.
    """
    wanted = ops.split(",") if ops else ["paged_attention", "flash_attention"]
    found = []
    for model in models:
        heads = read_heads(model)
        heads = heads.share(SPLIT[model]) if model in SPLIT else heads
        if "paged_attention" in wanted:
            name = implementation(target, "paged_attention", heads)
            paged = [Case("paged_attention", phase, heads, name) for phase in ("decode", "mixed")]
            found += paged
            if model in QUANTIZED and target.kind == "tpu":
                found += [
                    replace(case, kv_dtype=dtype) for dtype in ("int8", "float8_e4m3fn") for case in paged
                ]
        if "flash_attention" in wanted and not heads.shared_values:
            found.append(
                Case(
                    "flash_attention",
                    "prefill",
                    heads,
                    implementation(target, "flash_attention", heads),
                    rows=1,
                    context=8192,
                )
            )
    return found


def implementation(target: Target, op: str, heads: Heads) -> str:
    """What automatic choice takes on such a device."""
    if isinstance(target, GPUTarget):
        served = target.major == HOPPER and "gpu" in implementations(op) and not heads.shared_values
        return target.kind if served else "xla"
    return target.kind


def check(target: Target, todo: list[Case]) -> Iterator[Result]:
    """Compiles in one process, and in a new one from the next case on when a compiler takes the process with it."""
    while todo:
        answers, error = ask_child(
            "tools.compile_check.child", target, {"cases": [case.as_request() for case in todo]}, timeout=7200
        )
        for case, answer in zip(todo, answers):
            yield Result(target.name, case, answer)
        todo = todo[len(answers) :]
        if todo:
            yield Result(target.name, todo[0], {"error": error or "no answer", "seconds": 0.0})
            todo = todo[1:]


def line(result: Result) -> str:
    said = result.problem
    temporaries = "" if said else f"{result.answer['temp_bytes'] / 1e6:.1f}"
    verdict = "yes" if said is None else "**no**: " + " ".join(said.split())[:300].replace("|", "/")
    seconds = f"{result.answer['seconds']:.1f}"
    name = f"{result.case.name}, {result.case.implementation}"
    return f"| {result.target} | {name} | {verdict} | {seconds} | {temporaries} |"


def missing_line(target: Target, reason: str) -> str:
    return f"| {target.name} | all | not tried: {reason} | | |"
