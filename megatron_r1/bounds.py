"""Bounds of numbers, written where a configuration's field is, and obeyed wherever the field is used.

    num_engines: Annotated[int, at_least(1)] = 1

`number_faults` walks a whole configuration, so every stage that has the part obeys them. A float without bounds must be
finite. Rules that look at more than one field are functions of their part (config/).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True, slots=True)
class Bound:
    """What a number may be; `law` says it after "it must be"."""

    law: str
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Never for NaN and infinity."""
        return math.isfinite(value) and self.above < value < self.below and self.least <= value <= self.most


def at_least(least: float) -> Bound:
    return Bound(f"at least {least:g}", least=least)


def above(above: float, most: float = math.inf) -> Bound:
    law = f"above {above:g}" + (f" and at most {most:g}" if most < math.inf else "")
    return Bound(law, above=above, most=most)


SHARE = Bound("a share between 0 and 1", least=0.0, most=1.0)
DECAY = Bound("at least 0 and below 1", least=0.0, below=1.0)
FINITE = Bound("a finite number")

Natural = Annotated[int, at_least(0)]
Count = Annotated[int, at_least(1)]
Share = Annotated[float, SHARE]
NonNegative = Annotated[float, at_least(0)]
Positive = Annotated[float, above(0)]


def number_faults(config: object, field: str = "") -> list[str]:
    """`FIELD is VALUE; it must be LAW` for every number of a configuration that breaks its bounds, by its path."""
    return [
        f"{path} is {value}; it must be {bound.law}"
        for path, value, bound in _numbers(config, field)
        if not bound.holds(value)
    ]


def _numbers(value: Any, path: str, bound: Bound = FINITE) -> Iterator[tuple[str, float, Bound]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        bounds = bounds_of(type(value))
        for part in dataclasses.fields(value):
            own = f"{path}.{part.name}" if path else part.name
            yield from _numbers(getattr(value, part.name), own, bounds.get(part.name, FINITE))
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _numbers(item, f"{path}[{number}]", bound)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value, bound


@functools.cache
def bounds_of(kind: type) -> Mapping[str, Bound]:
    """The bounds of a dataclass's fields, by name; those of a tuple's items are written at the items."""
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        try:
            hints |= typing.get_type_hints(base, include_extras=True) if dataclasses.is_dataclass(base) else {}
        except Exception:  # annotations of a user's class that exist for a type checker only: its bases keep theirs
            continue
    found = {name: next(_bound_in(hint), None) for name, hint in hints.items()}
    return {name: bound for name, bound in found.items() if bound is not None}


def _bound_in(hint: Any) -> Iterator[Bound]:
    for part in (*getattr(hint, "__metadata__", ()), *typing.get_args(hint)):
        if isinstance(part, Bound):
            yield part
        elif typing.get_args(part) and typing.get_origin(part) is not typing.Literal:
            yield from _bound_in(part)
