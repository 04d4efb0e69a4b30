"""The rotary embedding's fields of config.json, in transformers 4's spelling and in transformers 5's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_r1.config.reader import Reader, short

ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
"""By rope type: (numbers it must have, numbers and switches it may have)."""

_WITHOUT_EFFECT = ("finetuned",)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeShape:
    """Rotary embedding. `kind` is a key of ROPE_FIELDS; `factors` holds the scaling's own numbers."""

    theta: float
    kind: str
    factors: Mapping[str, float]


def read_rope(read: Reader) -> RopeShape:
    """rope_theta + rope_scaling (transformers 4) or rope_parameters (5); of both, transformers takes rope_scaling."""
    given = read.raw.get("rope_scaling") or read.raw.get("rope_parameters") or {}
    if not isinstance(given, dict):
        read.refuse(f"rope_parameters or rope_scaling is {short(given)}; it must be an object")
    given = {key: value for key, value in given.items() if value is not None}
    kind = given.get("rope_type") or given.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        *others, last = ROPE_FIELDS
        read.refuse(f"rope type is {short(kind)}; supported are {', '.join(others)} and {last}")
    theta = given.get("rope_theta", read.raw.get("rope_theta"))
    if theta is None:
        read.refuse("neither rope_theta nor rope_parameters.rope_theta is given")
    theta = read.finite("rope_theta", theta)
    if theta <= 0:
        read.refuse(f"rope_theta is {theta}; it must be a number above 0")
    return RopeShape(theta=theta, kind=kind, factors=_factors(read, given, kind))


def _factors(read: Reader, given: Mapping[str, object], kind: str) -> dict[str, float]:
    needed, optional = ROPE_FIELDS[kind]
    for key in needed:
        if key not in given:
            read.refuse(f"rope scaling of type {kind} needs {key}")
    factors = {}
    for key, value in given.items():
        if key in needed or key in optional:
            factors[key] = read.finite(key, +value if isinstance(value, bool) and key == "truncate" else value)
        elif key == "partial_rotary_factor":
            if value != 1.0:
                read.refuse(f"partial_rotary_factor is {short(value)}; only 1.0 is supported")
        elif key not in ("rope_type", "type", "rope_theta", *_WITHOUT_EFFECT) and not _ignored(kind, value):
            read.refuse(f"{key} is {short(value)} in the rope scaling; type {kind} is built without it: remove it")
    for key in ("factor", "original_max_position_embeddings"):
        if factors.get(key, 1.0) <= 0:
            read.refuse(f"{key} is {factors[key]} in the rope scaling; it must be a number above 0")
    outside = read.raw.get("original_max_position_embeddings")
    inside = factors.get("original_max_position_embeddings")
    if inside is not None and outside not in (None, inside):
        read.refuse(f"original_max_position_embeddings is {short(outside)} and, in the rope scaling, {inside}")
    return factors


def _ignored(kind: str, value: object) -> bool:
    """Unscaled rope has no numbers of its own, so those left over from a scaling say nothing."""
    return kind == "default" and isinstance(value, int | float)
