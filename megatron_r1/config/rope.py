"""The rotary embedding's fields of config.json, in transformers 4's spelling and in transformers 5's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_r1.config.laws import hold_rope_laws
from megatron_r1.config.reader import Reader, short

ORIGINAL = "original_max_position_embeddings"
ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor", ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
"""By rope type: (numbers it must have, numbers and switches it may have)."""

_WITHOUT_EFFECT = ("finetuned",)
_NEVER_NULL = ("rope_type", "rope_theta", "partial_rotary_factor", "truncate")
"""What transformers takes for a null, where it takes one at all, is not what it takes for an absent field."""


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
    nulls = {key for key, value in given.items() if value is None}
    for key in _NEVER_NULL:
        if key in nulls:
            read.refuse(f"{key} is null in the rope scaling; leave it out, or write its value")
    given = {key: value for key, value in given.items() if value is not None}
    kind = given.get("rope_type") or given.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        *others, last = ROPE_FIELDS
        read.refuse(f"rope type is {short(kind)}; supported are {', '.join(others)} and {last}")
    theta = given.get("rope_theta", read.raw.get("rope_theta"))
    if theta is None:
        read.refuse("neither rope_theta nor rope_parameters.rope_theta is given")
    theta = read.finite("rope_theta", theta)
    if ORIGINAL in ROPE_FIELDS[kind][0]:
        given[ORIGINAL] = _original_positions(read, given, kind, ORIGINAL in nulls)
    factors = _factors(read, given, kind)
    hold_rope_laws(read, kind, {**factors, "rope_theta": theta})
    return RopeShape(theta=theta, kind=kind, factors=factors)


def _original_positions(read: Reader, given: Mapping[str, object], kind: str, null: bool) -> object:
    """original_max_position_embeddings of a scaling: its own, or the config's field beside it, or
    max_position_embeddings, as in transformers' standardize_rope_params. There the field beside it counts before the
    scaling's own; two values are refused here."""
    inside, outside = given.get(ORIGINAL), read.raw.get(ORIGINAL)
    if null or (ORIGINAL in read.raw and outside is None):
        read.refuse(
            f"{ORIGINAL} is null beside a rope scaling of type {kind}; write its number, or leave it out "
            "(transformers then takes max_position_embeddings)"
        )
    if inside is not None and outside not in (None, inside):
        read.refuse(f"{ORIGINAL} is {short(outside)} and, in the rope scaling, {short(inside)}")
    return next((value for value in (inside, outside) if value is not None), read.integer("max_position_embeddings"))


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
            read.refuse(f"{key} is {short(value)} in the rope scaling; {_remedy(read, key, kind, given)}")
    return factors


def _remedy(read: Reader, key: str, kind: str, given: Mapping[str, object]) -> str:
    """What to do about a number that a scaling is built without. DeepSeek-R1-0528-Qwen3-8B's attn_factor multiplies
    YaRN's own factor (0.1 ln(factor) + 1) in code that reads it; transformers 5 and vLLM 0.32 pass over it."""
    if kind != "yarn" or key != "attn_factor":
        return f"type {kind} is built without it: remove it"
    factor = max(1.0, read.finite("factor", given["factor"]))
    meant = read.finite(key, given[key]) * (0.1 * math.log(factor) + 1)
    return (
        "transformers and vLLM do not read it: remove it for the model that they make of this file, or write "
        f"attention_factor {meant:.6} in its place for the one that code makes which reads it"
    )


def _ignored(kind: str, value: object) -> bool:
    """Unscaled rope has no numbers of its own, so those left over from a scaling say nothing."""
    return kind == "default" and isinstance(value, int | float)
