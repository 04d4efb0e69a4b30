"""What a written answer is once it is read: a small tree of plain values. Left out: reading (reader.py) and meaning
(values.py, equality.py)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Number:
    """`value` is exact, as written. `places`: digits after the point where it was written as a decimal, else None;
    `digits`: its significant digits as written."""

    value: Fraction
    places: int | None = None
    digits: int = 0


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, constant or word: `x`, `a_1`, `f''`, `pi`, `e`, `i`, `infty`."""

    name: str


@dataclass(frozen=True, slots=True)
class Apply:
    """An operator or function on arguments: add, mul, div, pow, neg, pm, mp, percent, degree, sqrt, sin, ..."""

    name: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Items:
    """Several things: `kind` is "list" (bare, by commas), "and", "or" or "parts" (by semicolons), "set" (in braces),
    "ratio" (by colons), or the two brackets around: "()", "[]", "(]", "[)", "<>"."""

    kind: str
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """`terms[0] signs[0] terms[1] signs[1] ...`, as in 0 < x <= 1."""

    terms: tuple[Node, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetBuilder:
    """{variable | condition}."""

    variable: Node
    condition: Node


@dataclass(frozen=True, slots=True)
class Matrix:
    """`name` is "matrix" whatever the brackets, or "det" for vertical bars."""

    name: str
    rows: tuple[tuple[Node, ...], ...]


Node = Number | Symbol | Apply | Items | Relation | SetBuilder | Matrix


FLIPPED = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
"""The sign of a relation read from right to left."""


def symbols(node: Node) -> frozenset[str]:
    """The names of all symbols in a tree, constants too."""
    if isinstance(node, Symbol):
        return frozenset([node.name])
    return frozenset().union(*map(symbols, children(node))) if not isinstance(node, Number) else frozenset()


def has_decimal(node: Node) -> bool:
    """Is a number in it written with a decimal point?"""
    if isinstance(node, Number):
        return node.places is not None
    return any(map(has_decimal, children(node)))


def has_call(node: Node) -> bool:
    """Is a function in it that only has a name, such as f(x)?"""
    return (isinstance(node, Apply) and node.name.startswith("call ")) or any(map(has_call, children(node)))


def children(node: Node) -> tuple[Node, ...]:
    match node:
        case Apply(_, arguments):
            return arguments
        case Items(_, items):
            return items
        case Relation(terms, _):
            return terms
        case SetBuilder(variable, condition):
            return (variable, condition)
        case Matrix(_, rows):
            return tuple(entry for row in rows for entry in row)
    return ()
