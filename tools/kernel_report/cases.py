"""The rows of the committed table."""

from __future__ import annotations

from dataclasses import replace

from tools.kernel_cases import Case, Heads, implementations, read_heads


def shapes() -> list[Heads]:
    """Llama-3-8B; one device's share of 70B split eight ways; Gemma-2, whose head size is 256."""
    return [read_heads("llama-3-8b"), read_heads("llama-3-70b").share(8), read_heads("gemma-2-9b")]


def latents() -> list[Heads]:
    """Latent attention as one of four devices has it: DeepSeek V2 Lite, and V3 with eight times the query heads."""
    return [read_heads("deepseek-v2-lite").share(4), read_heads("deepseek-v3").share(4)]


def default_cases(kind: str) -> list[Case]:
    """For `tpu`, each of ours with jax's beside it; for `gpu`, ours."""
    cases = []
    for heads in shapes():
        for phase in ("decode", "mixed"):
            cases.append(Case("paged_attention", phase, heads, kind))
    if kind == "tpu":  # the GPU kernels read bf16 pages alone, and keep keys and values apart
        cases.append(Case("paged_attention", "decode", read_heads("llama-3-8b"), kind, kv_dtype="int8"))
        for heads in latents():
            cases += [Case("paged_attention", phase, heads, kind) for phase in ("decode", "mixed")]
    for heads in (read_heads("llama-3-8b"), read_heads("gemma-2-9b"), read_heads("phi-3-mini")):
        cases.append(Case("flash_attention", "prefill", heads, kind, rows=1, context=8192))
    if kind == "gpu":
        return [case for case in cases if "gpu" in implementations(case.op)]
    return [both for case in cases for both in (case, _jax_twin(case)) if both is not None]


def _jax_twin(case: Case) -> Case | None:
    # jax's own takes one scale for the whole pool, and keeps keys and values apart: not the same work
    if case.kv_dtype == "int8" or case.heads.shared_values:
        return None
    return replace(case, implementation="jax")
