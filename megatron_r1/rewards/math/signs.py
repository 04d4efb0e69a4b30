"""Plus-minus signs as the two answers that they stand for, and degrees as the unit that they are outside of
functions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from megatron_r1.rewards.math.tree import Apply, Items, Matrix, Node, Number, Relation, SetBuilder, children

UNORDERED = ("list", "and", "or", "set")


def expanded(node: Node) -> Node:
    """An expression with plus-minus signs as the list of what it stands for."""
    if isinstance(node, Items) and node.kind in UNORDERED:
        return Items(node.kind, tuple(_flat(map(expanded, node.items), node.kind)))
    if not _has_sign(node):
        return node
    variants = [_signed(node, plus) for plus in (True, False)]
    return Items("or", tuple(variants))


def _flat(nodes: Any, kind: str) -> list[Node]:
    flat: list[Node] = []
    for node in nodes:
        flat += node.items if isinstance(node, Items) and node.kind == "or" and kind in UNORDERED else [node]
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
        case Relation(terms, signs):
            return Relation(tuple(_signed(term, plus) for term in terms), signs)
        case SetBuilder(variable, condition):
            return SetBuilder(_signed(variable, plus), _signed(condition, plus))
        case Matrix(name, rows):
            return Matrix(name, tuple(tuple(_signed(entry, plus) for entry in row) for row in rows))
    return node


def without_degrees(node: Node) -> Node:
    """Degrees are a unit at the outside, an angle inside of functions."""
    match node:
        case Apply("degree", (inside,)):
            return inside
        case Apply("neg", (Apply("degree", (inside,)),)):
            return Apply("neg", (inside,))
        case Items(kind, items):
            return Items(kind, tuple(map(without_degrees, items)))
        case Relation(terms, signs):
            return Relation(tuple(map(without_degrees, terms)), signs)
    return node
