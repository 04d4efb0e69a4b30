"""Are two numbers, or two expressions with variables, equal?

Numbers: exact where both are exact. Expressions with variables: equal at random points where all parts are real, as
WeBWorK and other homework graders do (Schwartz and Zippel: polynomials that differ are unequal at almost every point).
Values that are no fractions are compared at two precisions: the difference of equal ones shrinks with the precision,
that of different ones stays. A decimal is exact too, with two exceptions (decimals_match): noise of floating point, and
a rounding, to at least six places, of an exact value that has no finite decimal.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

from megatron_r1.rewards.math.tree import (
    Apply,
    Matrix,
    Node,
    Number,
    Relation,
    SetBuilder,
    children,
    has_call,
    has_decimal,
    symbols,
)
from megatron_r1.rewards.math.values import NOT_VARIABLES, AbsorbedError, Evaluation, NoValueError, TooLargeError

PRECISIONS = (200, 480)
"""Bits of the first and the second comparison."""

MORE_PRECISION = (1200, 6000)
"""Bits that are tried where a sum swallows a term."""

POINTS = (*((trial, sign) for sign in (1, -1, -2) for trial in range(3)), *((trial, 0) for trial in range(4)))
"""(trial, sign) of values.Evaluation; the last ones have whole numbers, at which floor and ceiling jump."""

WHOLE_POINTS = tuple((trial, 0) for trial in range(12))
WHOLE_NAMES = frozenset("nkmpqijN")
"""Variables that stand for whole numbers where a floor, a ceiling or a power of a negative number is taken."""
ENOUGH_POINTS = 4
NOISE = Fraction(1, 10**9)


def same_expression(gold: Node, given: Node) -> bool:
    if isinstance(gold, Relation | SetBuilder | Matrix) or isinstance(given, Relation | SetBuilder | Matrix):
        return False
    names = symbols(gold), symbols(given)
    if "ldots" in names[0] | names[1]:
        return False
    variables = (names[0] | names[1]) - NOT_VARIABLES
    calls = any(has_call(node) for node in (gold, given))
    try:
        if not variables and not calls:
            return _same_value(gold, given)
        if names[0] - NOT_VARIABLES != names[1] - NOT_VARIABLES and not calls:
            # x - x + 1 is not what is asked for where 1 is: variables that cancel do not count as the same answer
            return False
        return _same_at_points(gold, given)
    except TooLargeError:
        return _same_structure(gold, given)


def _same_structure(gold: Node, given: Node) -> bool:
    """Of values that nobody can hold: the same operator on equal arguments."""
    if type(gold) is not type(given) or getattr(gold, "name", "") != getattr(given, "name", ""):
        return False
    first, second = children(gold), children(given)
    return len(first) == len(second) > 0 and all(itertools.starmap(same_expression, zip(first, second, strict=True)))


def _same_value(gold: Node, given: Node) -> bool:
    """Two numbers without variables."""
    try:
        first, second = (Evaluation(bits=PRECISIONS[0]).value(node) for node in (gold, given))
    except AbsorbedError:
        first = second = None
    except TooLargeError:
        raise
    except NoValueError:
        return False
    if first is not None and has_decimal(gold) != has_decimal(given):
        decimal, exact = (gold, second) if has_decimal(gold) else (given, first)
        value = first if has_decimal(gold) else second
        return decimals_match(value, exact, decimal)
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        if first == second:
            return True
        return has_decimal(gold) and has_decimal(given) and (_is_noise(first, second) or _both_rounded(gold, given))
    return _agree(lambda bits: Evaluation(bits=bits), gold, given) is True


def _same_at_points(gold: Node, given: Node) -> bool:
    """Equal wherever both are real, at enough points; where they are real almost nowhere, equal as complex numbers."""
    real, complex_ones = 0, 0
    points = WHOLE_POINTS if _is_of_whole_numbers(gold, given) else POINTS
    for trial, sign in points:
        try:
            agreement = _agree(lambda bits, t=trial, s=sign: Evaluation(bits=bits, trial=t, sign=s), gold, given)
        except TooLargeError:
            raise
        except NoValueError:
            continue
        if agreement is False:
            return False
        if agreement is True:
            real += 1
        elif agreement == "complex":
            complex_ones += 1
    return real >= ENOUGH_POINTS or (real == 0 and complex_ones >= ENOUGH_POINTS) or real + complex_ones >= len(points)


def _is_of_whole_numbers(gold: Node, given: Node) -> bool:
    names = (symbols(gold) | symbols(given)) - NOT_VARIABLES
    return names <= WHOLE_NAMES and (_jumps(gold) or _jumps(given))


def _jumps(node: Node) -> bool:
    """Is a floor or a ceiling taken in it, or a power of a negative number?"""
    match node:
        case Apply("floor" | "ceil", _) | Apply("pow", (Apply("neg", (Number(),)), _)):
            return True
    return any(map(_jumps, children(node)))


def _agree(make: Any, gold: Node, given: Node) -> bool | str | None:
    """True or False; "complex": both are complex and equal; None: one of them is complex, which says nothing about real
    variables."""
    sizes: list[int | None] = []
    for bits in PRECISIONS:
        point, first, second, real = _both(make, bits, gold, given)
        if isinstance(first, Fraction) and isinstance(second, Fraction):
            return first == second
        one, other = point.number(first), point.number(second)
        mp = point.mp
        if not (mp.isfinite(one) and mp.isfinite(other)):
            return bool(one == other)
        real = real or _has_i(gold, given)
        difference = abs(one - other)
        if difference > mp.ldexp(max(abs(one), abs(other)), -40):
            return False if real else None
        sizes.append(mp.mag(difference) if difference else None)
    size, second_size = sizes
    if second_size is None:
        shrinks = True
    elif size is None:
        shrinks = second_size < -PRECISIONS[1] // 2
    else:
        shrinks = second_size <= size - (PRECISIONS[1] - PRECISIONS[0]) // 2
    if not shrinks:
        return False
    return True if real else "complex"


def _both(make: Any, bits: int, gold: Node, given: Node) -> tuple[Evaluation, Any, Any, bool]:
    """Both values, with more precision where a sum needs it, and whether all that they are made of is real."""
    for precision in (bits, *MORE_PRECISION):
        point = make(precision)
        try:
            first, second = point.value(gold), point.value(given)
        except AbsorbedError:
            continue
        return point, first, second, not point.saw_complex
    raise TooLargeError


def decimals_match(decimal: Any, exact: Any, written: Node) -> bool:
    """Is an expression with a decimal in it equal to an exact one? Where the values are equal, and otherwise where they
    differ by noise (relatively by less than 1e-9 and neither is a whole number), or where the decimal is what the exact
    value rounds to at its last place: the exact value has no finite decimal, and at least six places of which four
    digits are significant, or eight significant digits, are written (math-verify compares six places of every number,
    of which a small number has few or none, and a large one more than it can be asked for)."""
    if isinstance(decimal, Fraction) and isinstance(exact, Fraction):
        if decimal == exact:
            return True
        if _is_noise(decimal, exact):
            return True
        if _is_finite_decimal(exact):
            return False
    shown = _bare_decimal(written)
    point = Evaluation(bits=PRECISIONS[0])
    first, second = point.number(decimal), point.number(exact)
    mp = point.mp
    if not (mp.isfinite(first) and mp.isfinite(second)) or mp.im(first) or mp.im(second):
        return first == second
    if abs(first - second) <= mp.mpf(10) ** -9 * min(abs(first), abs(second), 1):
        return True
    if shown is None or shown.places is None:
        return False
    number, scale = shown.places, _scale(written)
    if not (shown.digits >= 8 or (number >= 6 and shown.digits >= 4)):
        return False
    return abs(first - second) <= mp.mpf(10) ** (scale - number) / 2 * (1 + mp.mpf(10) ** -12)


def _is_noise(first: Fraction, second: Fraction) -> bool:
    if first.denominator == second.denominator == 1:
        return False
    return abs(first - second) <= NOISE * min(abs(first), abs(second), 1)


def _both_rounded(gold: Node, given: Node) -> bool:
    """Two decimals of which the shorter, to six places or more, is the rounding of the longer."""
    one, other = _bare_decimal(gold), _bare_decimal(given)
    if one is None or other is None or _scale(gold) or _scale(given):
        return False
    short, long = sorted((one, other), key=lambda number: number.places or 0)
    if (short.places or 0) < 6 or short.digits < 4:
        return False
    return abs(short.value - long.value) <= Fraction(1, 2 * 10 ** (short.places or 0))


def _bare_decimal(node: Node) -> Number | None:
    """The number of a tree that is nothing but a decimal with a sign, a percent sign or a power of ten."""
    match node:
        case Number():
            return node
        case Apply("neg" | "percent", (inside,)):
            return _bare_decimal(inside)
        case Apply("mul", (inside, Apply("pow", (Number(base), _)))) if base == 10:
            return _bare_decimal(inside)
    return None


def _scale(node: Node) -> int:
    match node:
        case Apply("neg", (inside,)):
            return _scale(inside)
        case Apply("percent", (inside,)):
            return _scale(inside) - 2
        case Apply("mul", (_, Apply("pow", (_, exponent)))):
            try:
                value = Evaluation(bits=64).value(exponent)
            except NoValueError:
                return 0
            return int(value) if isinstance(value, Fraction) and value.denominator == 1 and abs(value) < 10_000 else 0
    return 0


def _is_finite_decimal(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def constant_factor(gold: Node, given: Node) -> int | None:
    """The sign of the constant c for which given = c * gold at every point; None if there is none."""
    found: Any = None
    points = 0
    for trial, sign in POINTS:
        try:
            point = Evaluation(bits=PRECISIONS[0], trial=trial, sign=sign)
            one, other = point.number(point.value(gold)), point.number(point.value(given))
        except NoValueError:
            continue
        mp = point.mp
        if one == 0 or other == 0 or not (mp.isfinite(one) and mp.isfinite(other)):
            continue
        factor = other / one
        if abs(mp.im(factor)) > mp.ldexp(1, -120) * abs(factor):
            continue
        factor = mp.re(factor)
        if found is not None and abs(factor - found) > mp.ldexp(1, -120) * abs(factor):
            return None
        found = factor
        points += 1
    return None if points < ENOUGH_POINTS else (1 if found > 0 else -1)


def _has_i(*nodes: Node) -> bool:
    return any("i" in symbols(node) for node in nodes)
