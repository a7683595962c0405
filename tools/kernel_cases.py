"""The kernels of `pallas_kernels` at the shapes of real models: one list for compiling, costing and timing them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parent.parent / "configs" / "models"
PAGE_SIZE = 32


@dataclass(frozen=True)
class Heads:
    """One layer's attention as a model's config.json describes it, or one device's share of it."""

    model: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    soft_cap: float | None = None
    value_dim: int | None = None  # latent attention: so many numbers of a key are its value

    @property
    def shared_values(self) -> bool:
        return self.value_dim is not None

    def share(self, devices: int) -> Heads:
        """What one device has when heads are split `devices` ways."""
        if self.heads % devices or (self.kv_heads % devices and not self.shared_values):
            raise ValueError(
                f"{self.model}: {self.heads} and {self.kv_heads} heads do not divide by {devices}"
            )
        name = f"{self.model} / {devices}"
        # The one head of a latent is there once on each device.
        kv_heads = self.kv_heads if self.shared_values else self.kv_heads // devices
        return replace(self, model=name, heads=self.heads // devices, kv_heads=kv_heads)


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
      op: `paged_attention` or `flash_attention`.
      phase: `decode` (one query per row), `mixed` (decode rows beside prompt chunks) or `prefill` (whole sequences).
      implementation: a name of the op's registry, or `jax`: jax's own kernel for the same work.
      rows, context: sequences and the tokens that each of them can have.
      tokens: of the flat axis of a mixed step.
      kv_dtype: of the kept keys and values.
    """

    op: str
    phase: str
    heads: Heads
    implementation: str
    rows: int = 64
    context: int = 2048
    tokens: int = 512
    page_size: int = PAGE_SIZE
    kv_dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        kv = "" if self.kv_dtype == "bfloat16" else f", {self.kv_dtype} KV"
        return f"{self.op} {self.phase}, {self.heads.model}{kv}"

    def as_request(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "heads"}
        return fields | {"heads": {name: getattr(self.heads, name) for name in Heads.__dataclass_fields__}}

    @classmethod
    def from_request(cls, request: dict[str, Any]) -> Case:
        return cls(**{**request, "heads": Heads(**request["heads"])})


# Too large for the tables of whole models, so that no configuration is kept: one layer's attention is of interest.
_LARGE = {"deepseek-v3": Heads("deepseek-v3", heads=128, kv_heads=1, head_dim=576, value_dim=512)}


def read_heads(model: str) -> Heads:
    """From `configs/models/{model}/config.json`; a window only where the model uses it."""
    if model in _LARGE:
        return _LARGE[model]
    config = json.loads((MODELS / model / "config.json").read_text())
    heads = config["num_attention_heads"]
    if "kv_lora_rank" in config:
        latent = config["kv_lora_rank"]
        width = latent + config["qk_rope_head_dim"]
        return Heads(model=model, heads=heads, kv_heads=1, head_dim=width, value_dim=latent)
    return Heads(
        model=model,
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
        soft_cap=config.get("attn_logit_softcapping"),
    )


def implementations(op: str) -> tuple[str, ...]:
    """The names that the op's registry knows."""
    module = importlib.import_module(f"pallas_kernels.{op}.api")
    return module.REGISTRY.names


def models() -> list[str]:
    """Models whose attention shapes stand for the others': few, since each costs seconds per kernel and target."""
    return [
        "deepseek-v2-lite",
        "deepseek-v3",
        "gemma-2-9b",
        "gpt-oss-20b",
        "llama-3-70b",
        "llama-3-8b",
        "phi-3-mini",
        "qwen2.5-7b",
    ]


def build(case: Case, devices: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
    """A jitted function and the shapes of its arguments, placed on the first of the devices.

    The kernel runs under `shard_map` over a mesh of that one device: so its lowering learns which chip it is for.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    function, arguments, donated = BUILDERS[case.op, case.implementation == "jax"](case)
    mesh = Mesh(np.array(devices[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments, is_leaf=_is_shape
    )
    whole = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(),) * len(arguments),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return jax.jit(whole, donate_argnums=donated), placed


def lower(case: Case, devices: list[Any]) -> Any:
    """The case's program, lowered for a device that need not be there."""
    with described(devices):
        function, arguments = build(case, devices)
        return function.lower(*arguments)


def described(devices: list[Any]) -> Any:
    """A context in which kernels see what they are made for: the abstract mesh tells the chip and its cores."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    return jax.sharding.use_abstract_mesh(Mesh(np.array(devices[:1]), ("device",)).abstract_mesh)


def _is_shape(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _shape(*sizes: int, dtype: str = "bfloat16") -> Any:
    import jax
    import jax.numpy as jnp

    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


def batch_shapes(case: Case) -> Any:
    """A `RaggedBatch` of shapes."""
    from pallas_kernels.paged_attention import RaggedBatch

    pages = -(-case.context // case.page_size)
    return RaggedBatch(
        query_starts=_shape(case.rows + 1, dtype="int32"),
        context_lens=_shape(case.rows, dtype="int32"),
        page_table=_shape(case.rows, pages, dtype="int32"),
        num_decode_rows=_shape(dtype="int32"),
        num_rows=_shape(dtype="int32"),
        decode_only=case.phase == "decode",
    )


def pool_bytes(case: Case) -> int:
    """Of the KV pool that a paged case donates. Call it where `described` holds."""
    if case.op != "paged_attention" or case.implementation == "jax":
        return 0
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_paged(case)[1][3]))


def num_tokens(case: Case) -> int:
    return case.rows if case.phase == "decode" else case.tokens


def _paged(case: Case) -> tuple[Callable[..., Any], list[Any], tuple[int, ...]]:
    from pallas_kernels import paged_attention as pa
    from pallas_kernels.paged_attention import api as pa_api

    shape, tokens, name = case.heads, num_tokens(case), case.implementation
    pages = case.rows * -(-case.context // case.page_size) + 1
    pool = pa.kv_shape(
        pages,
        case.page_size,
        shape.kv_heads,
        shape.head_dim,
        case.kv_dtype,
        shared_values=shape.shared_values,
        implementation=name,
    )

    scales: dict[str, Any] = {"k_scale": 0.05, "v_scale": 0.05} if case.kv_dtype in pa_api.QUANTIZED else {}

    def step(q, k, v, kv, batch, page_offset):
        plan = pa.prepare(batch, kv, tokens, implementation=name)
        kv = pa.write_kv(kv, k, v, plan, page_offset=page_offset, **scales)
        options = {
            **scales,
            "scale": shape.head_dim**-0.5,
            "sliding_window": shape.window,
            "soft_cap": shape.soft_cap,
            "value_dim": shape.value_dim,
        }
        return pa.attend(q, kv, plan, page_offset=page_offset, **options), kv

    new = _shape(tokens, shape.kv_heads, shape.head_dim)
    q = _shape(tokens, shape.heads, shape.head_dim)
    return step, [q, new, new, pool, batch_shapes(case), _shape(dtype="int32")], (3,)


JAX_BLOCKS = {
    "decode": (1, 512),
    "mixed": (32, 512),
}  # queries and KV tokens: the best of its own tuned sizes here


def _jax_paged(case: Case) -> tuple[Callable[..., Any], list[Any], tuple[int, ...]]:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    shape, tokens = case.heads, num_tokens(case)
    queries, block = JAX_BLOCKS[case.phase]
    pages_per_row = -(-case.context // case.page_size)
    pages = case.rows * pages_per_row + 1

    def step(q, kv, context_lens, page_table, query_starts, num_rows):
        return ragged_paged_attention(
            q,
            kv,
            context_lens,
            page_table,
            query_starts,
            num_rows,
            sm_scale=shape.head_dim**-0.5,
            sliding_window=shape.window,
            soft_cap=shape.soft_cap,
            num_queries_per_block=queries,
            num_kv_pages_per_block=block // case.page_size,
            vmem_limit_bytes=64 * 1024 * 1024,
        )

    arguments = [
        _shape(tokens, shape.heads, shape.head_dim),
        _shape(pages, case.page_size, 2 * shape.kv_heads, shape.head_dim, dtype=case.kv_dtype),
        _shape(case.rows, dtype="int32"),
        _shape(case.rows, pages_per_row, dtype="int32"),
        _shape(case.rows + 1, dtype="int32"),
        _shape(1, dtype="int32"),
    ]
    return step, arguments, ()


def _flash(case: Case) -> tuple[Callable[..., Any], list[Any], tuple[int, ...]]:
    from pallas_kernels import flash_attention as fa

    shape = case.heads

    def score(q, k, v, lengths):
        return fa.attend(
            q,
            k,
            v,
            scale=shape.head_dim**-0.5,
            lengths=lengths,
            sliding_window=shape.window,
            soft_cap=shape.soft_cap,
            implementation=case.implementation,
        )

    q = _shape(case.rows, case.context, shape.heads, shape.head_dim)
    kv = _shape(case.rows, case.context, shape.kv_heads, shape.head_dim)
    return score, [q, kv, kv, _shape(case.rows, dtype="int32")], ()


SPLASH_BLOCKS = (512, 1024, 512)  # queries, keys, and keys per product


def pairs_per_pass(case: Case) -> int | None:
    """(query head, key) pairs that a pass of a dense kernel's loop works on; None for the other kernels."""
    if case.op != "flash_attention":
        return None
    if case.implementation == "jax":
        return SPLASH_BLOCKS[0] * SPLASH_BLOCKS[1]
    import jax.numpy as jnp

    from pallas_kernels.flash_attention import AttentionSpec, tpu_plan

    shape = case.heads
    spec = AttentionSpec(
        batch=case.rows,
        length=case.context,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=jnp.dtype("bfloat16"),
        scale=1.0,
        window=shape.window,
        soft_cap=shape.soft_cap,
    )
    blocks = tpu_plan.choose_blocks(spec)
    return spec.groups * blocks.queries * blocks.keys


def _jax_flash(case: Case) -> tuple[Callable[..., Any], list[Any], tuple[int, ...]]:
    """jax's splash attention: grouped heads, causal or windowed, with its mask skipped block by block."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    shape, length = case.heads, case.context
    size = (length, length)
    if shape.window is not None and shape.window < length:
        mask = masks.LocalMask(size, (shape.window - 1, 0), 0)
    else:
        mask = masks.CausalMask(size)
    splash = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * shape.heads),
        block_sizes=kernel.BlockSizes(*SPLASH_BLOCKS),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=shape.soft_cap,
    )

    def score(q, k, v):
        import jax

        return jax.vmap(splash)(q, k, v)

    q = _shape(case.rows, shape.heads, length, shape.head_dim)
    kv = _shape(case.rows, shape.kv_heads, length, shape.head_dim)
    return score, [q, kv, kv], ()


BUILDERS: dict[tuple[str, bool], Callable[[Case], tuple[Callable[..., Any], list[Any], tuple[int, ...]]]] = {
    ("paged_attention", False): _paged,
    ("paged_attention", True): _jax_paged,
    ("flash_attention", False): _flash,
    ("flash_attention", True): _jax_flash,
}
