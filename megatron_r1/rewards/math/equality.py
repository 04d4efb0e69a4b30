r"""Do two trees mean the same?

Numbers and expressions are compared in expressions.py. Here sets, intervals and the inequalities that describe them,
tuples, lists, matrices, ratios and equations are compared by their parts. Left out: words and units (words.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from megatron_r1.rewards.math.expressions import constant_factor, same_expression
from megatron_r1.rewards.math.names import UNORDERED, split_names, unnamed
from megatron_r1.rewards.math.real_sets import as_real_set, same_real_set
from megatron_r1.rewards.math.signs import expanded, without_degrees
from megatron_r1.rewards.math.tree import (
    FLIPPED,
    Apply,
    Items,
    Matrix,
    Node,
    Number,
    Relation,
    SetBuilder,
    Symbol,
    children,
    has_call,
    symbols,
)
from megatron_r1.rewards.math.values import NOT_VARIABLES

MOST_ITEMS = 40


def same(gold: Node, given: Node) -> bool:
    """True if `given` answers what `gold` answers. Not symmetric: an answer may name what the reference leaves out,
    as in `x = 5` for 5, and the other way round."""
    gold, given = without_degrees(expanded(gold)), without_degrees(expanded(given))
    if gold == given:
        return True
    gold, given = unnamed(gold, given, _same)
    return _same(gold, given)


def _same(gold: Node, given: Node) -> bool:
    if gold == given:
        return True
    if (_is_set_like(gold) or _is_set_like(given)) and _may_be_same_set(gold, given):
        first, second = as_real_set(gold), as_real_set(given)
        if first is not None and second is not None:
            return same_real_set(first, second, same_expression)
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
    return same_expression(gold, given)


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
        return _same_members(split_names(gold.items), split_names(given.items))
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
    if len(gold) > MOST_ITEMS:
        return _same_in_order(gold, given)
    for item in gold:
        found = next((place for place, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _distinct(items: Sequence[Node]) -> list[Node]:
    if len(items) > MOST_ITEMS:
        return list(items)  # comparing each with each takes too long
    kept: list[Node] = []
    for item in items:
        if not any(_same(item, other) for other in kept):
            kept.append(item)
    return kept


def _same_ratio(gold: Sequence[Node], given: Sequence[Node]) -> bool:
    """1:2:3 and 2:4:6, by cross multiplication with the first terms."""
    zero = Number(Fraction(0))
    if len(gold) != len(given) or any(
        same_expression(one, zero) != same_expression(other, zero) for one, other in zip(gold, given, strict=True)
    ):
        return False
    return all(
        same_expression(Apply("mul", (gold[0], other)), Apply("mul", (given[0], one)))
        for one, other in zip(gold[1:], given[1:], strict=True)
    )


def _same_ratio_and_number(gold: Node, given: Node) -> bool:
    for ratio, number in ((gold, given), (given, gold)):
        if isinstance(ratio, Items) and ratio.kind == "ratio" and len(ratio.items) == 2:
            if not isinstance(number, Apply) or number.name != "div":
                return False
            return same_expression(Apply("div", ratio.items), number)
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


def _same_relation(gold: Relation, given: Relation) -> bool:
    if not symbols(gold) - NOT_VARIABLES and gold.terms[0] != given.terms[0] and not has_call(gold):
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
    factor = constant_factor(_difference(gold), _difference(given))
    if factor is None:
        return False
    if factor < 0:
        other_sign = FLIPPED[other_sign]
    return sign == other_sign


def _flipped(relation: Relation) -> Relation:
    signs = tuple(FLIPPED.get(sign, f"flipped {sign}") for sign in reversed(relation.signs))
    return Relation(tuple(reversed(relation.terms)), signs)


def _difference(relation: Relation) -> Node:
    return Apply("add", (relation.terms[0], Apply("neg", (relation.terms[1],))))


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
