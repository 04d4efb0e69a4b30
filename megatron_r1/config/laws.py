"""What the numbers of a config.json must be: the one table, by field.

The laws are transformers 5's own: what its classes raise on, what its functions cannot compute (a division by zero, a
logarithm of a negative number, NaN), and what its checks of a rope scaling say a number must be. Numbers that it
computes are not refused, so `original_max_position_embeddings` may be as large as max_position_embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.config.reader import Reader, short

Numbers = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Law:
    """`holds(value, all)`: of the field's value, beside all others (read and of the right kind already). `must`: the
    rest of the sentence "it must ..."."""

    field: str
    holds: Callable[[Any, Numbers], bool]
    must: str


def turns_in_pairs(field: str) -> Law:
    return Law(field, lambda value, _: value % 2 == 0, "be even: rotary embeddings turn pairs of numbers")


def whole_heads() -> Law:
    return Law(
        "hidden_size",
        lambda value, all_: value % all_["num_attention_heads"] == 0,
        "be a multiple of num_attention_heads",
    )


FIELD_LAWS = (
    Law("rms_norm_eps", lambda value, _: value > 0, "be above 0, or a row of zeros is divided by 0"),
    Law("initializer_range", lambda value, _: value >= 0, "be at least 0: it is a standard deviation"),
)
"""Of every architecture's fields; architectures/ has those of one alone. Sizes are positive integers already
(reader.py)."""


def _above_zero(field: str) -> Law:
    return Law(field, lambda value, _: value > 0, "be a number above 0")


def _default_at_zero(field: str) -> Law:
    return Law(field, lambda value, _: value >= 0, "be at least 0 (0 is taken for the default)")


def _magnitude(number: str) -> Law:
    """YaRN's 0.1 * mscale * ln(factor) + 1 of both numbers, whose quotient multiplies cosine and sine."""

    def holds(value: float, all_: Numbers) -> bool:
        if all_.get("attention_factor") is not None or not (all_.get("mscale") and all_.get("mscale_all_dim")):
            return True
        return all_["factor"] <= 1 or 0.1 * value * math.log(all_["factor"]) + 1.0 != 0

    return Law(number, holds, f"not make 0.1 * {number} * ln(factor) + 1 zero: the scores are multiplied or divided")


_ORIGINAL = _above_zero("original_max_position_embeddings")
_THETA = _above_zero("rope_theta")
_FACTOR = Law("factor", lambda value, _: value >= 1, "be at least 1: a scaling makes more positions, not fewer")
ROPE_LAWS: dict[str, tuple[Law, ...]] = {
    "default": (_THETA,),
    "linear": (
        _THETA,
        _FACTOR,
    ),
    "llama3": (
        _THETA,
        _FACTOR,
        _ORIGINAL,
        _above_zero("low_freq_factor"),
        Law(
            "high_freq_factor",
            lambda value, all_: value > all_["low_freq_factor"],
            "be greater than low_freq_factor, or no wavelength lies between",
        ),
    ),
    "yarn": (
        _THETA,
        _FACTOR,
        _ORIGINAL,
        _above_zero("attention_factor"),
        _default_at_zero("beta_fast"),
        _default_at_zero("beta_slow"),
        Law(
            "beta_fast",
            lambda value, all_: (value or 32) >= (all_.get("beta_slow") or 1),
            "be at least beta_slow (its default is 1), or the ramp runs backwards",
        ),
        Law(
            "beta_slow",
            lambda value, all_: (value or 1) <= (all_.get("beta_fast") or 32),
            "be at most beta_fast (its default is 32), or the ramp runs backwards",
        ),
        _magnitude("mscale"),
        _magnitude("mscale_all_dim"),
        Law("rope_theta", lambda value, _: value != 1, "not be 1: YaRN divides by its logarithm"),
    ),
}
"""By rope type, of the scaling's numbers and rope_theta."""


def hold_field_laws(read: Reader, own: Sequence[Law]) -> None:
    """Refuse by its name the first field that breaks its law, one of every architecture's or of its `own`. A field that
    is null or absent has none."""
    _hold(read, [*FIELD_LAWS, *own], read.raw, "")


def hold_rope_laws(read: Reader, kind: str, numbers: Numbers) -> None:
    """The same for a rope scaling of type `kind`; `numbers` are its own and rope_theta."""
    _hold(read, ROPE_LAWS[kind], numbers, f" in the rope scaling of type {kind}")


def _hold(read: Reader, laws: Any, values: Numbers, where: str) -> None:
    for law in laws:
        value = values.get(law.field)
        if value is not None and not law.holds(value, values):
            place = "" if law.field in read.raw else where
            read.refuse(f"{law.field} is {short(value)}{place}; it must {law.must}")
