r"""What an answer is called: `x = 5`, `m + n = 204` and `9 * 2 = 18` answer what 5, 204 and 18 answer.

`x^2 = 18` and `-x = 18` say something else than 18, and `a + b = 1` as a reference is a line, no number. Comparing
values is the caller's: `same` is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

from megatron_r1.rewards.math.tree import Apply, Items, Node, Number, Relation, Symbol, has_call, symbols
from megatron_r1.rewards.math.values import NOT_VARIABLES, Evaluation, NoValueError

UNORDERED = ("list", "and", "or")
Same = Callable[[Node, Node], bool]


def unnamed(gold: Node, given: Node, same: Same) -> tuple[Node, Node]:
    """Both without the name of what is asked where only one of them has it."""
    gold, given = _paired(_exact_part(gold)), _paired(_exact_part(given))
    if _is_equation(given) and not _is_equation(gold):
        value = _named_value(given, same)
        return gold, given if value is None else value
    if _is_equation(gold) and not _is_equation(given):
        value = _named_value(gold, same)
        name = gold.terms[0]
        is_curve = isinstance(name, Apply) and name.name == "add"  # a + b = 1 is more than 1
        return gold if value is None or is_curve else value, given
    if _is_equation(gold) and _is_equation(given):
        first, second = (_chain(node, same) for node in (gold, given))
        return first, second
    if isinstance(gold, Items) and gold.kind in UNORDERED and not _has_equation(given):
        return _in_order_of_names(_without_common_name(gold), given), given
    if isinstance(given, Items) and given.kind in UNORDERED and not _has_equation(gold):
        return gold, _in_order_of_names(_without_common_name(given), gold)
    return gold, given


def _is_equation(node: Node) -> TypeGuard[Relation]:
    return isinstance(node, Relation) and set(node.signs) == {"="}


def _has_equation(node: Node) -> bool:
    return _is_equation(node) or (isinstance(node, Items) and any(map(_is_equation, node.items)))


def _chain(node: Node, same: Same) -> Node:
    """`x = 9 * 2 = 18` as `x = 18`, if the numbers agree."""
    assert isinstance(node, Relation)
    if len(node.terms) <= 2:
        return node
    name, *values = node.terms
    if all(same(values[0], value) for value in values[1:]):
        return Relation((name, values[-1]), ("=",))
    return node


def _named_value(node: Node, same: Same) -> Node | None:
    """What an equation says of a quantity: 18 of `x = 18`, `m + n = 18` and `9 * 2 = 18`; None of `x^2 = 18`, `-x = 18`
    and `17 = 18`, which say something else."""
    assert isinstance(node, Relation)
    name, *values = node.terms
    if _is_quantity(values[-1]) and not symbols(name) - NOT_VARIABLES:  # 204 = m + n
        name, *values = reversed(node.terms)
    if not all(same(values[0], value) for value in values[1:]):
        return None
    if not (symbols(name) - NOT_VARIABLES) and not has_call(name):
        return values[-1] if not symbols(values[-1]) - NOT_VARIABLES and same(name, values[-1]) else None
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
        case Apply("abs", (Apply("mul", (Symbol(), Symbol())),)):  # |AB|
            return True
        case Apply("add", terms):  # m + n, m^2 + n^2, 100a + b; an equation of a curve has minus signs or constants
            return all(map(_is_positive_term, terms))
        case Apply("mul" | "div", (left, right)):  # abc, m/n
            return _is_product_of_symbols(left) and _is_product_of_symbols(right)
    return False


def _is_product_of_symbols(node: Node) -> bool:
    match node:
        case Symbol(name):
            return name not in NOT_VARIABLES
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
    named = split_names(items.items)
    found = [node for node in named if isinstance(node, Relation) and node.signs == ("=",)]
    names = {_without_index(node.terms[0]) for node in found}
    if len(found) != len(named) or len(names) != 1 or not _is_quantity(found[0].terms[0]):
        return items
    return Items(items.kind, tuple(node.terms[1] for node in found))


def split_names(items: Sequence[Node]) -> list[Node]:
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


def _in_order_of_names(named: Items, other: Node) -> Items:
    """`y = 2, x = 1` as `1; 2` beside values without names, which then stand in an order; a pair beside a pair."""
    found = [node for node in named.items if isinstance(node, Relation) and node.signs == ("=",)]
    names = [node.terms[0].name for node in found if isinstance(node.terms[0], Symbol)]
    if len(names) != len(named.items) or len(set(names)) != len(names):
        return named
    values = tuple(node.terms[1] for _, node in sorted(zip(names, found, strict=True), key=lambda pair: pair[0]))
    return Items("()" if isinstance(other, Items) and other.kind == "()" else "parts", values)


def _without_index(name: Node) -> Node:
    """x_1 and x_2 are two values of x."""
    return Symbol(name.name.partition("_")[0]) if isinstance(name, Symbol) and name.name[-1:].isdigit() else name


def _exact_part(node: Node) -> Node:
    r"""`x = 1/3 \approx 0.33` as `x = 1/3`, and `x \approx 5` as `x = 5`."""
    if not isinstance(node, Relation) or "approx" not in node.signs or set(node.signs) - {"=", "approx"}:
        return node
    place = node.signs.index("approx")
    if place == 0 and _is_quantity(node.terms[0]) and len(node.terms) == 2:
        return Relation(node.terms, ("=",))
    exact = node.terms[place]
    if not all(_is_near(exact, term) for term in node.terms[place + 1 :]):
        return node
    return Relation(node.terms[: place + 1], node.signs[:place]) if place else exact


def _is_near(exact: Node, approximate: Node) -> bool:
    """Within a twentieth: what is further off is another number, not an approximation."""
    point = Evaluation(bits=64)
    try:
        one, other = point.number(point.value(exact)), point.number(point.value(approximate))
    except NoValueError:
        return False
    return bool(abs(one - other) <= abs(one) / 20)


def _paired(node: Node) -> Node:
    """`(x, y) = (1, 2)` as `x = 1, y = 2`."""
    match node:
        case Relation((Items("()", names), Items("()", values)), ("=",)) if len(names) == len(values):
            if all(isinstance(name, Symbol) for name in names):
                pairs = zip(names, values, strict=True)
                return Items("list", tuple(Relation((name, value), ("=",)) for name, value in pairs))
        case Relation((Symbol(), Items("set") as values), ("in",)):  # x in {2, 3}
            return values
    return node
