r"""Sets of real numbers, from intervals, unions and the inequalities that describe them: `(-\infty, -3) \cup (4,
\infty)` and `x < -3 or x > 4` are the same. Only bounds without variables; what is no such set gives None."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.rewards.math.tree import FLIPPED, Apply, Items, Node, Relation, SetBuilder, Symbol, symbols
from megatron_r1.rewards.math.values import NOT_VARIABLES, Evaluation, NoValueError

BITS = 200
MINUS_INFINITY = Apply("neg", (Symbol("infty"),))
INFINITY = Symbol("infty")


@dataclass(frozen=True, slots=True)
class Interval:
    """From `low` to `high`, as written and as numbers; `has_low`, `has_high`: with its ends."""

    low: Node
    has_low: bool
    high: Node
    has_high: bool
    low_value: Any
    high_value: Any


RealSet = Sequence[Interval]
"""Intervals in ascending order, none touching the next."""

WHOLE = (MINUS_INFINITY, False, INFINITY, False)


def as_real_set(node: Node) -> RealSet | None:
    """The set that a tree describes, or None."""
    match node:
        case Symbol("R"):
            return _joined([_interval(*WHOLE)])
        case Symbol("emptyset"):
            return []
        case Items("()" | "[]" | "(]" | "[)" as kind, (low, high)):
            return _joined([_interval(low, kind[0] == "[", high, kind[1] == "]")])
        case Items("set", items):
            return _joined([_interval(item, True, item, True) for item in items])
        case Apply("cup", (left, right)):
            return _union([as_real_set(left), as_real_set(right)])
        case Apply("cap", (left, right)):
            return _intersection(as_real_set(left), as_real_set(right))
        case Apply("setminus", (left, right)):
            return _intersection(as_real_set(left), _complement(as_real_set(right)))
        case Items("or" | "list", items) if all(isinstance(item, Relation | Apply | SetBuilder) for item in items):
            return _union([as_real_set(item) for item in items]) if len(_variables(items)) <= 1 else None
        case Items("and", items) if all(isinstance(item, Relation) for item in items):
            if len(_variables(items)) > 1:
                return None
            found = as_real_set(items[0])
            for item in items[1:]:
                found = _intersection(found, as_real_set(item))
            return found
        case SetBuilder(variable, condition):
            return as_real_set(condition) if symbols(variable) == _variables([condition]) else None
        case Relation():
            return _of_relation(node)
    return None


def same_real_set(first: RealSet, second: RealSet, same_number: Callable[[Node, Node], bool]) -> bool:
    return len(first) == len(second) and all(
        one.has_low == other.has_low
        and one.has_high == other.has_high
        and same_number(one.low, other.low)
        and same_number(one.high, other.high)
        for one, other in zip(first, second, strict=True)
    )


def _variables(nodes: Sequence[Node]) -> frozenset[str]:
    return frozenset().union(*map(symbols, nodes)) - NOT_VARIABLES - {"R", "emptyset"}


def _of_relation(relation: Relation) -> RealSet | None:
    """Of `x < 3`, `3 > x`, `0 < x <= 1`, `x != 3`, `x = 3` and `x in S`, with one variable that stands alone."""
    terms, signs = relation.terms, relation.signs
    if signs == ("in",):
        return as_real_set(terms[1]) if isinstance(terms[0], Symbol) else None
    places = [place for place, term in enumerate(terms) if isinstance(term, Symbol) and term.name not in NOT_VARIABLES]
    if len(places) != 1 or len(_variables(terms)) != 1:
        return None
    found: RealSet | None = _joined([_interval(*WHOLE)])
    place = places[0]
    for index, sign in enumerate(signs):
        if index not in (place, place - 1):
            return None
        bound = terms[index + 1] if index == place else terms[index]
        found = _intersection(found, _beside(sign if index == place else FLIPPED.get(sign, ""), bound))
    return found


def _beside(sign: str, bound: Node) -> RealSet | None:
    if sign in ("<", "<="):
        return _joined([_interval(MINUS_INFINITY, False, bound, sign == "<=")])
    if sign in (">", ">="):
        return _joined([_interval(bound, sign == ">=", INFINITY, False)])
    if sign == "=":
        return _joined([_interval(bound, True, bound, True)])
    if sign == "!=":
        return _complement(_joined([_interval(bound, True, bound, True)]))
    return None


def _interval(low: Node, has_low: bool, high: Node, has_high: bool) -> Interval | None:
    values = []
    for bound in (low, high):
        if symbols(bound) - NOT_VARIABLES:
            return None
        try:
            point = Evaluation(bits=BITS)
            value = point.number(point.value(bound))
        except NoValueError:
            return None
        if not isinstance(value, point.mp.mpf):
            return None
        values.append(value)
    if values[0] > values[1] or (values[0] == values[1] and not (has_low and has_high)):
        return None
    mp = point.mp
    return Interval(
        low, has_low and bool(mp.isfinite(values[0])), high, has_high and bool(mp.isfinite(values[1])), *values
    )


def _joined(parts: Sequence[Interval | None]) -> RealSet | None:
    """Sorted, with overlapping and touching intervals made one."""
    if any(part is None for part in parts):
        return None
    ordered = sorted((part for part in parts if part is not None), key=lambda part: (part.low_value, not part.has_low))
    joined: list[Interval] = []
    for part in ordered:
        last = joined[-1] if joined else None
        if last is not None and (
            part.low_value < last.high_value or (part.low_value == last.high_value and (part.has_low or last.has_high))
        ):
            further = part.high_value > last.high_value or (part.high_value == last.high_value and part.has_high)
            end = part if further else last
            joined[-1] = Interval(last.low, last.has_low, end.high, end.has_high, last.low_value, end.high_value)
        else:
            joined.append(part)
    return joined


def _union(sets: Sequence[RealSet | None]) -> RealSet | None:
    if any(one is None for one in sets):
        return None
    return _joined([part for one in sets if one is not None for part in one])


def _intersection(first: RealSet | None, second: RealSet | None) -> RealSet | None:
    if first is None or second is None:
        return None
    found = []
    for one in first:
        for other in second:
            low = max((one, other), key=lambda part: (part.low_value, not part.has_low))
            high = min((one, other), key=lambda part: (part.high_value, part.has_high))
            if low.low_value < high.high_value or (low.low_value == high.high_value and low.has_low and high.has_high):
                found.append(
                    Interval(low.low, low.has_low, high.high, high.has_high, low.low_value, high.high_value)
                )  # fmt: skip
    return _joined(found)


def _complement(whole: RealSet | None) -> RealSet | None:
    if whole is None:
        return None
    parts = []
    low, has_low = MINUS_INFINITY, False
    for part in whole:
        parts.append((low, has_low, part.low, not part.has_low))
        low, has_low = part.high, not part.has_high
    parts.append((low, has_low, INFINITY, False))
    # An end at infinity leaves nothing beyond it.
    return _joined([made for made in (_interval(*part) for part in parts) if made is not None])
