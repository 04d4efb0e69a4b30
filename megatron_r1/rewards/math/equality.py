r"""Do two trees mean the same?

Numbers: exact where both are exact. Expressions with variables: equal at random points where both are real, as WeBWorK
and other homework graders do (Schwartz and Zippel: polynomials that differ are unequal at almost every point). Values
that are no fractions are compared at two precisions: the difference of equal ones shrinks with the precision, that of
different ones stays. A decimal is exact too, with two exceptions (decimals_match): noise of floating point, and a
rounding, to at least six places, of an exact value that has no finite decimal.

Sets, intervals and the inequalities that describe them, tuples, lists, matrices, ratios and equations are compared by
their parts. Left out: words and units (words.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeGuard

from megatron_r1.rewards.math.real_sets import as_real_set, same_real_set
from megatron_r1.rewards.math.tree import (
    Apply,
    Items,
    Matrix,
    Node,
    Number,
    Relation,
    SetBuilder,
    Symbol,
    children,
    has_decimal,
    symbols,
)
from megatron_r1.rewards.math.values import NOT_VARIABLES, AbsorbedError, Evaluation, NoValueError, TooLargeError

PRECISIONS = (200, 480)
"""Bits of the first and the second comparison."""

MORE_PRECISION = (1200, 6000)
"""Bits that are tried where a sum swallows a term."""

POINTS = tuple((trial, sign) for sign in (1, -1, -2) for trial in range(3))
ENOUGH_POINTS = 4
NOISE = Fraction(1, 10**9)
UNORDERED = ("list", "and", "or")
MAX_VARIANTS = 4
"""Of an expression with plus-minus signs."""


def same(gold: Node, given: Node) -> bool:
    """True if `given` answers what `gold` answers. Not symmetric: an answer may name what the reference leaves out,
    as in `x = 5` for 5, and the other way round."""
    gold, given = _without_degrees(_expanded(gold)), _without_degrees(_expanded(given))
    if gold == given:
        return True
    gold, given = _unnamed(gold, given)
    return _same(gold, given)


def _same(gold: Node, given: Node) -> bool:
    if gold == given:
        return True
    if (_is_set_like(gold) or _is_set_like(given)) and _may_be_same_set(gold, given):
        first, second = as_real_set(gold), as_real_set(given)
        if first is not None and second is not None:
            return same_real_set(first, second, _same_number)
    if isinstance(gold, Matrix) or isinstance(given, Matrix):
        return _same_matrix(gold, given)
    if isinstance(gold, Relation) and isinstance(given, Relation):
        return _same_relation(gold, given)
    if isinstance(gold, SetBuilder) and isinstance(given, SetBuilder):
        return _same(gold.variable, given.variable) and _same(gold.condition, given.condition)
    if isinstance(gold, Items) and isinstance(given, Items):
        return _same_items(gold, given)
    if isinstance(gold, Items) or isinstance(given, Items):
        return _same_ratio_and_number(gold, given)
    if isinstance(gold, Apply) and isinstance(given, Apply) and gold.name in ("cup", "cap", "setminus"):
        return gold.name == given.name and all(map(_same, gold.arguments, given.arguments))
    return _same_expression(gold, given)


# -- numbers and expressions


def _same_number(gold: Node, given: Node) -> bool:
    return _same_expression(gold, given)


def _same_expression(gold: Node, given: Node) -> bool:
    if isinstance(gold, Relation | SetBuilder | Matrix) or isinstance(given, Relation | SetBuilder | Matrix):
        return False
    names = symbols(gold), symbols(given)
    if "ldots" in names[0] | names[1]:
        return False
    variables = (names[0] | names[1]) - NOT_VARIABLES
    calls = any(_has_call(node) for node in (gold, given))
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
    return len(first) == len(second) > 0 and all(itertools.starmap(_same_expression, zip(first, second, strict=True)))


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
    for trial, sign in POINTS:
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
    return real >= ENOUGH_POINTS or (real == 0 and complex_ones >= ENOUGH_POINTS) or real + complex_ones >= len(POINTS)


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
    if abs(first - second) <= mp.mpf(10) ** -9 * min(abs(first), abs(second)):
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


# -- several things


def _same_items(gold: Items, given: Items) -> bool:
    if gold.kind == given.kind == "ratio":
        return _same_ratio(gold.items, given.items)
    if "ratio" in (gold.kind, given.kind):
        return False
    if gold.kind == "set" or given.kind == "set":
        if not {gold.kind, given.kind} <= {"set", "parts", *UNORDERED}:
            return False
        return _same_members(_distinct(gold.items), _distinct(given.items))
    if gold.kind in UNORDERED and given.kind in UNORDERED:
        return _same_members(_split_names(gold.items), _split_names(given.items))
    if "parts" in (gold.kind, given.kind) and {gold.kind, given.kind} <= {"parts", *UNORDERED}:
        return _same_in_order(gold.items, given.items)
    if gold.kind != given.kind and {gold.kind, given.kind} != {"()", "<>"}:
        return False
    return _same_in_order(gold.items, given.items)


def _same_in_order(gold: Sequence[Node], given: Sequence[Node]) -> bool:
    return len(gold) == len(given) and all(map(same, gold, given))


def _same_members(gold: Sequence[Node], given: Sequence[Node]) -> bool:
    left = list(given)
    if len(gold) != len(left):
        return False
    for item in gold:
        found = next((place for place, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _distinct(items: Sequence[Node]) -> list[Node]:
    kept: list[Node] = []
    for item in items:
        if not any(_same(item, other) for other in kept):
            kept.append(item)
    return kept


def _split_names(items: Sequence[Node]) -> list[Node]:
    """`x = 1, 2` as `x = 1, x = 2`."""
    split: list[Node] = []
    name: Node | None = None
    for item in items:
        if isinstance(item, Relation) and item.signs == ("=",) and isinstance(item.terms[0], Symbol):
            name = item.terms[0]
        elif name is not None and not isinstance(item, Relation):
            item = Relation((name, item), ("=",))
        split.append(item)
    return split


def _same_ratio(gold: Sequence[Node], given: Sequence[Node]) -> bool:
    """1:2:3 and 2:4:6, by cross multiplication with the first terms."""
    if len(gold) != len(given):
        return False
    return all(
        _same_expression(Apply("mul", (gold[0], other)), Apply("mul", (given[0], one)))
        for one, other in zip(gold[1:], given[1:], strict=True)
    )


def _same_ratio_and_number(gold: Node, given: Node) -> bool:
    for ratio, number in ((gold, given), (given, gold)):
        if isinstance(ratio, Items) and ratio.kind == "ratio" and len(ratio.items) == 2:
            if not isinstance(number, Apply) or number.name != "div":
                return False
            return _same_expression(Apply("div", ratio.items), number)
    return False


def _same_matrix(gold: Node, given: Node) -> bool:
    if isinstance(gold, Matrix) and isinstance(given, Matrix):
        return (
            gold.name == given.name
            and [len(row) for row in gold.rows] == [len(row) for row in given.rows]
            and _same_in_order(children(gold), children(given))
        )
    vector, other = (gold, given) if isinstance(gold, Matrix) else (given, gold)
    assert isinstance(vector, Matrix)
    if isinstance(other, Items) and other.kind in ("()", "<>") and 1 in (len(vector.rows), len(vector.rows[0])):
        return vector.name == "matrix" and _same_in_order(children(vector), other.items)
    return False


# -- equations and names


def _same_relation(gold: Relation, given: Relation) -> bool:
    if not symbols(gold) - NOT_VARIABLES and gold.terms[0] != given.terms[0] and not _has_call(gold):
        return False  # of 9 * 2 = 18 and 3 * 6 = 18 neither answers what the other answers
    for other in (given, _flipped(given)):
        if gold.signs == other.signs and all(map(_same, gold.terms, other.terms)):
            return True
    if len(gold.signs) != 1 or len(given.signs) != 1:
        return False
    sign, other_sign = gold.signs[0], given.signs[0]
    if sign not in FLIPPED or other_sign not in FLIPPED:
        return False
    if symbols(gold) - NOT_VARIABLES != symbols(given) - NOT_VARIABLES:
        return False
    factor = _constant_factor(_difference(gold), _difference(given))
    if factor is None:
        return False
    if factor < 0:
        other_sign = FLIPPED[other_sign]
    return sign == other_sign


FLIPPED = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}


def _flipped(relation: Relation) -> Relation:
    signs = tuple(FLIPPED.get(sign, f"flipped {sign}") for sign in reversed(relation.signs))
    return Relation(tuple(reversed(relation.terms)), signs)


def _difference(relation: Relation) -> Node:
    return Apply("add", (relation.terms[0], Apply("neg", (relation.terms[1],))))


def _constant_factor(gold: Node, given: Node) -> int | None:
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


def _unnamed(gold: Node, given: Node) -> tuple[Node, Node]:
    """Both without the name of what is asked where only one of them has it."""
    gold, given = _paired(_exact_part(gold)), _paired(_exact_part(given))
    if _is_equation(given) and not _is_equation(gold):
        value = _named_value(given)
        return gold, given if value is None else value
    if _is_equation(gold) and not _is_equation(given):
        value = _named_value(gold)
        name = gold.terms[0]
        is_curve = isinstance(name, Apply) and name.name == "add"  # a + b = 1 is more than 1
        return gold if value is None or is_curve else value, given
    if _is_equation(gold) and _is_equation(given):
        first, second = (_chain(node) for node in (gold, given))
        return first, second
    if isinstance(gold, Items) and gold.kind in UNORDERED and not _has_equation(given):
        return _without_common_name(gold), given
    if isinstance(given, Items) and given.kind in UNORDERED and not _has_equation(gold):
        return gold, _without_common_name(given)
    return gold, given


def _is_equation(node: Node) -> TypeGuard[Relation]:
    return isinstance(node, Relation) and set(node.signs) == {"="}


def _has_equation(node: Node) -> bool:
    return _is_equation(node) or (isinstance(node, Items) and any(map(_is_equation, node.items)))


def _chain(node: Node) -> Node:
    """`x = 9 * 2 = 18` as `x = 18`, if the numbers agree."""
    assert isinstance(node, Relation)
    if len(node.terms) <= 2:
        return node
    name, *values = node.terms
    if all(_same(values[0], value) for value in values[1:]):
        return Relation((name, values[-1]), ("=",))
    return node


def _named_value(node: Node) -> Node | None:
    """What an equation says of a quantity: 18 of `x = 18`, `m + n = 18` and `9 * 2 = 18`; None of `x^2 = 18`, `-x = 18`
    and `17 = 18`, which say something else."""
    assert isinstance(node, Relation)
    name, *values = node.terms
    if _is_quantity(values[-1]) and not symbols(name) - NOT_VARIABLES:  # 204 = m + n
        name, *values = reversed(node.terms)
    if not all(_same(values[0], value) for value in values[1:]):
        return None
    if not (symbols(name) - NOT_VARIABLES) and not _has_call(name):
        return values[-1] if not symbols(values[-1]) - NOT_VARIABLES and _same(name, values[-1]) else None
    return values[-1] if _is_quantity(name) else None


def _is_quantity(name: Node) -> bool:
    match name:
        case Symbol(symbol):
            return symbol not in NOT_VARIABLES
        case Apply("abs", (Symbol(),)):
            return True
        case Apply(function, _) if function.startswith("call "):
            return True
        case Apply("sin" | "cos" | "tan", (Symbol(),)):
            return True
        case Items("()", items):
            return all(isinstance(item, Symbol) for item in items)
        case Apply("abs", (Apply("mul", (Symbol(), Symbol())),)):  # |AB|
            return True
        case Apply("add", terms):  # m + n, m^2 + n^2, 100a + b; an equation of a curve has minus signs or constants
            return all(map(_is_positive_term, terms))
        case Apply("mul" | "div", (left, right)):  # abc, m/n
            return _is_product_of_symbols(left) and _is_product_of_symbols(right)
    return False


def _is_product_of_symbols(node: Node) -> bool:
    match node:
        case Symbol():
            return True
        case Apply("mul", (left, right)):
            return _is_product_of_symbols(left) and _is_product_of_symbols(right)
    return False


def _is_positive_term(term: Node) -> bool:
    match term:
        case Symbol():
            return True
        case Apply("mul", (Number(), Symbol())):
            return True
        case Apply("pow", (Symbol(name), Number())):
            return name not in ("x", "y", "z")  # x^2 + y^2 = 1 is a circle
    return False


def _without_common_name(items: Items) -> Items:
    """`x = 1 or x = 2` as `1, 2`; lists of several names stay."""
    named = _split_names(items.items)
    found = [node for node in named if isinstance(node, Relation) and node.signs == ("=",)]
    names = {_without_index(node.terms[0]) for node in found}
    if len(found) != len(named) or len(names) != 1 or not _is_quantity(found[0].terms[0]):
        return items
    return Items(items.kind, tuple(node.terms[1] for node in found))


def _without_index(name: Node) -> Node:
    """x_1 and x_2 are two values of x."""
    return Symbol(name.name.partition("_")[0]) if isinstance(name, Symbol) and name.name[-1:].isdigit() else name


def _exact_part(node: Node) -> Node:
    r"""`x = 1/3 \approx 0.33` as `x = 1/3`, and `x \approx 5` as `x = 5`."""
    if not isinstance(node, Relation) or "approx" not in node.signs or set(node.signs) - {"=", "approx"}:
        return node
    place = node.signs.index("approx")
    if place == 0 and _is_quantity(node.terms[0]):
        return Relation(node.terms[:2], ("=",))
    return Relation(node.terms[: place + 1], node.signs[:place]) if place else node.terms[0]


def _paired(node: Node) -> Node:
    """`(x, y) = (1, 2)` as `x = 1, y = 2`."""
    match node:
        case Relation((Items("()", names), Items("()", values)), ("=",)) if len(names) == len(values):
            if all(isinstance(name, Symbol) for name in names):
                return Items("()", values)
    return node


# -- signs and degrees


def _expanded(node: Node) -> Node:
    """An expression with plus-minus signs as the list of what it stands for."""
    if isinstance(node, Items):
        return Items(node.kind, tuple(_flat(map(_expanded, node.items), node.kind)))
    if not _has_sign(node):
        return node
    if isinstance(node, Relation):
        variants = [Relation(tuple(_signed(term, plus) for term in node.terms), node.signs) for plus in (True, False)]
    else:
        variants = [_signed(node, plus) for plus in (True, False)]
    return Items("or", tuple(variants))


def _flat(nodes: Any, kind: str) -> list[Node]:
    flat: list[Node] = []
    for node in nodes:
        flat += node.items if isinstance(node, Items) and node.kind == "or" and kind in (*UNORDERED, "set") else [node]
    return flat


def _has_sign(node: Node) -> bool:
    return (isinstance(node, Apply) and node.name in ("pm", "mp")) or any(map(_has_sign, children(node)))


def _signed(node: Node, plus: bool) -> Node:
    match node:
        case Apply("pm" | "mp" as sign, (left, right)):
            left, right = _signed(left, plus), _signed(right, plus)
            positive = plus == (sign == "pm")
            right = right if positive else Apply("neg", (right,))
            return right if left == Number(Fraction(0)) else Apply("add", (left, right))
        case Apply(name, arguments):
            return Apply(name, tuple(_signed(argument, plus) for argument in arguments))
        case Items(kind, items):
            return Items(kind, tuple(_signed(item, plus) for item in items))
    return node


def _without_degrees(node: Node) -> Node:
    """Degrees are a unit at the outside, an angle inside of functions."""
    match node:
        case Apply("degree", (inside,)):
            return inside
        case Apply("neg", (Apply("degree", (inside,)),)):
            return Apply("neg", (inside,))
        case Items(kind, items):
            return Items(kind, tuple(map(_without_degrees, items)))
        case Relation(terms, signs):
            return Relation(tuple(map(_without_degrees, terms)), signs)
    return node


def _is_set_like(node: Node) -> bool:
    match node:
        case Items("()" | "[]" | "(]" | "[)", items):
            return len(items) == 2
        case Items("list" | "or" | "and", items):
            return any(map(_is_set_like, items))
        case Apply("cup" | "cap" | "setminus", _) | SetBuilder():
            return True
        case Relation(_, signs):
            return bool(set(signs) & {"<", ">", "<=", ">=", "in", "!="})
        case Symbol("R" | "emptyset"):
            return True
    return False


def _may_be_same_set(gold: Node, given: Node) -> bool:
    """An interval has no variable, two inequalities have to have the same one."""
    one, other = (symbols(node) - NOT_VARIABLES - {"R", "emptyset"} for node in (gold, given))
    return not one or not other or one == other


def _has_call(node: Node) -> bool:
    return (isinstance(node, Apply) and node.name.startswith("call ")) or any(map(_has_call, children(node)))


def _has_i(*nodes: Node) -> bool:
    return any("i" in symbols(node) for node in nodes)
