"""The rotary embedding that a config.json asks for."""

from __future__ import annotations

from dataclasses import replace

from jinfer.errors import ModelError
from jinfer.layers.rope import Rotary
from jinfer.models.fields import Fields

# What a section may hold; a type passes over the settings of others, as transformers does.
ROPE_KEYS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "finetuned",  # who trained it, not how
        "high_freq_factor",
        "long_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
        "rope_type",
        "short_factor",
        "truncate",
        "type",
    }
)
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_rotary(
    fields: Fields,
    head_dim: int,
    max_position_embeddings: int,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    interleaved: bool = False,
) -> Rotary:
    """The rotary embedding of every layer, in either spelling.

    transformers 5 writes `rope_parameters` with rope_theta and rope_type inside; older ones write
    `rope_theta` beside `rope_scaling`, with the type under `rope_type` or `type`. Where both stand,
    `rope_scaling` goes first, and a rope_theta inside goes before one outside, as in transformers.

    theta: the family's base where the file says none. partial: the family's share of each head that is rotated,
    which the file may change; None where the family always rotates whole heads.
    """
    fields.idle("rope_parameters")  # beside rope_scaling
    section = fields.section("rope_scaling") or fields.section("rope_parameters") or Fields({}, fields.where)
    return section_rotary(
        fields,
        section,
        head_dim,
        max_position_embeddings,
        theta=theta,
        partial=partial,
        interleaved=interleaved,
    )


def section_rotary(
    fields: Fields,
    section: Fields,
    head_dim: int,
    max_position_embeddings: int,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    interleaved: bool = False,
) -> Rotary:
    """As `read_rotary`, from one given section; models may have several, one per kind of layer."""
    _refuse_unknown(section)
    source = section if section.has("rope_theta") else fields
    base = source.number("rope_theta", low=1.0, high=1e15, default=theta)
    dim = _rotated(fields, section, head_dim, partial)
    kind = section.string("rope_type" if section.has("rope_type") else "type", default="default")
    if kind not in ROPE_TYPES:
        raise ModelError(
            f"{section.where}: rope type {kind[:80]!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    plain = Rotary(dim, base, interleaved=interleaved)
    if kind == "default":
        return plain
    original = _original_length(fields, section, max_position_embeddings)
    ratio = max_position_embeddings / original
    if kind == "longrope":
        return _longrope(section, replace(plain, kind=kind, original=original), ratio)
    if kind == "yarn" and not section.has("factor"):
        factor = ratio
    else:
        factor = section.number("factor", low=1.0, high=1e6)
    if kind == "linear":
        return replace(plain, kind=kind, factor=factor)
    if kind == "dynamic":
        return replace(plain, kind=kind, factor=factor, original=max_position_embeddings)
    scaled = replace(plain, kind=kind, factor=factor, original=original)
    return _llama3(section, scaled) if kind == "llama3" else _yarn(section, scaled)


def _refuse_unknown(section: Fields) -> None:
    unknown = [key for key, value in section.values.items() if value is not None and key not in ROPE_KEYS]
    if unknown:
        raise section.error(
            unknown[0][:60], f"only {', '.join(sorted(ROPE_KEYS))}: another key may change angles"
        )


def _rotated(fields: Fields, section: Fields, head_dim: int, partial: float | None) -> int:
    """How many leading numbers of a head are rotated."""
    key = "partial_rotary_factor"
    source = section if section.has(key) else fields
    share = source.number(key, low=0.0, high=1.0, default=1.0 if partial is None else partial)
    if partial is None and share != 1.0:
        raise source.error(key, "1.0: this family rotates whole heads")
    dim = int(head_dim * share)
    if dim < 2 or (dim == head_dim and dim % 2):
        raise ModelError(
            f"{fields.where}: {dim} of the {head_dim} numbers of a head are rotated, expected an even number of "
            "at least 2: rotary embedding turns pairs"
        )
    return dim


def _original_length(fields: Fields, section: Fields, max_position_embeddings: int) -> int:
    # Some families write the trained length outside; transformers gives that one priority.
    key = "original_max_position_embeddings"
    source = fields if fields.has(key) else section
    return source.integer(key, low=1, high=2**31 - 1, default=max_position_embeddings)


def _longrope(section: Fields, rotary: Rotary, ratio: float) -> Rotary:
    count = -(-rotary.dim // 2)
    return replace(
        rotary,
        factor=section.number("factor", low=0.0, high=1e6, default=ratio),
        attention_factor=section.number("attention_factor", low=0.0, high=1e6, default=None),
        short_factors=section.numbers("short_factor", low=1e-6, high=1e9, count=count),
        long_factors=section.numbers("long_factor", low=1e-6, high=1e9, count=count),
    )


def _llama3(section: Fields, rotary: Rotary) -> Rotary:
    low = section.number("low_freq_factor", low=1e-6, high=1e6)
    high = section.number("high_freq_factor", low=1e-6, high=1e6)
    if high <= low:
        raise section.error("high_freq_factor", f"more than low_freq_factor ({low:g})")
    return replace(rotary, low_freq_factor=low, high_freq_factor=high)


def _yarn(section: Fields, rotary: Rotary) -> Rotary:
    # transformers takes the standard betas for null and for 0 alike.
    fast = section.number("beta_fast", low=0.0, high=1e6, default=None) or 32.0
    slow = section.number("beta_slow", low=0.0, high=1e6, default=None) or 1.0
    if fast < slow:
        raise section.error("beta_fast", f"at least beta_slow ({slow:g})")
    return replace(
        rotary,
        attention_factor=section.number("attention_factor", low=0.0, high=1e6, default=None),
        beta_fast=fast,
        beta_slow=slow,
        mscale=section.number("mscale", low=0.0, high=1e6, default=None),
        mscale_all_dim=section.number("mscale_all_dim", low=0.0, high=1e6, default=None),
        truncate=section.boolean("truncate", default=True),
    )
