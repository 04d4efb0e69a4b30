"""What a configuration's fields are, read from its dataclasses: path, type, default, bound and meaning of each.

docs/configuration.md and `--help` are both printed from this one walk. A field's meaning is the string below it in the
source, as tyro reads it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.algorithms.base import Algorithm
from megatron_r1.bounds import bounds_of

REQUIRED = "required"


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of a configuration, or one whole part of it (`part` is then its dataclass)."""

    path: tuple[str, ...]
    type: str
    default: str
    """As the command line would be given it; REQUIRED where there is none."""
    bound: str
    """What a number must be; empty: any."""
    meaning: str
    part: type | None = None
    items: type | None = None
    """The dataclass of the entries, where the field is a list of them."""

    @property
    def option(self) -> str:
        """As the command line spells it; a field of a list's entries has no option, only a path."""
        path = ".".join(self.path)
        return path if "[]" in path else "--" + path.replace("_", "-")


def fields_of(kind: type, given: object = None, within: tuple[str, ...] = ()) -> Iterator[Field]:
    """The fields of a dataclass in order, parts as one field each. `given`: an object whose values are the defaults."""
    hints = hints_of(kind)
    meanings, bounds = meanings_of(kind), bounds_of(kind)
    for field in dataclasses.fields(kind):
        value = getattr(given, field.name) if given is not None else _default(field)
        hint = hints.get(field.name, Any)
        part = _part(hint, value)
        bound = bounds.get(field.name)
        yield Field(
            path=(*within, field.name),
            type=type_text(hint),
            default=value_text(value),
            bound=bound.law if bound and bound.law != "a finite number" else "",
            meaning=meanings.get(field.name, ""),
            part=part,
            items=_items(hint),
        )


def leaves_of(kind: type, given: object = None, within: tuple[str, ...] = ()) -> Iterator[Field]:
    """As fields_of, with the fields of every part in place of the part. A part that may be absent comes first itself;
    the fields of a list's entries follow the list."""
    for field in fields_of(kind, given, within):
        if field.part is None:
            yield field
            if field.items is not None:
                yield from leaves_of(field.items, None, (*within, f"{field.path[-1]}[]"))
            continue
        own = getattr(given, field.path[-1]) if given is not None else defaults_of(kind)[field.path[-1]]
        if own is None:
            yield field
        yield from leaves_of(field.part, own if dataclasses.is_dataclass(own) else None, field.path)


def meaning_of(kind: type) -> str:
    """The first paragraph of a dataclass's docstring."""
    text = inspect.cleandoc(vars(kind).get("__doc__") or "")
    return "" if text.startswith(f"{kind.__name__}(") else " ".join(text.split("\n\n")[0].split())


@functools.cache
def meanings_of(kind: type) -> Mapping[str, str]:
    """By field: the string below it. A class without source has none."""
    return {
        name: " ".join(text.split())
        for base in reversed(kind.__mro__)
        if dataclasses.is_dataclass(base)
        for name, text in _own_meanings(base)
    }


def _own_meanings(kind: type) -> Iterator[tuple[str, str]]:
    """(field, the string below it) of the fields that this very class adds."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    except (OSError, TypeError, KeyError, SyntaxError):
        return
    own = next((n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == kind.__name__), None)
    body = own.body if own else []
    for node, below in itertools.pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            yield node.target.id, below.value.value


def hints_of(kind: type) -> Mapping[str, Any]:
    """By field: its type. Those of a user's class may not be found."""
    try:
        return typing.get_type_hints(kind)
    except Exception:  # annotations of a user's class that exist for a type checker only
        return {}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def defaults_of(kind: type) -> dict[str, Any]:
    """By field; dataclasses.MISSING where there is none."""
    return {field.name: _default(field) for field in dataclasses.fields(kind)}


def _part(hint: Any, value: Any) -> type | None:
    """The dataclass that a field holds, if it holds one: that of its value, else of its type."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)
    for one in (hint, *typing.get_args(hint)):
        if isinstance(one, type) and dataclasses.is_dataclass(one) and typing.get_origin(hint) is not tuple:
            return one
    return None


def _items(hint: Any) -> type | None:
    one = next(iter(typing.get_args(hint)), None) if typing.get_origin(hint) is tuple else None
    return one if isinstance(one, type) and dataclasses.is_dataclass(one) else None


def value_text(value: Any) -> str:
    """A default as a reader sees it."""
    if value is dataclasses.MISSING:
        return REQUIRED
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return " ".join(value_text(item) for item in value) or "empty"
    if isinstance(value, str | Path):
        return str(value) or "empty"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "" if not isinstance(value, Algorithm) else type(value).__name__
    return str(value)


def type_text(hint: Any) -> str:
    """A type in words: `path`, `number`, `a or b`."""
    origin, items = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(str, items))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if item is type(None) else type_text(item) for item in items)
    if origin is tuple:
        return f"any number of: {type_text(items[0])}" if items[-1:] == (...,) else ", ".join(map(type_text, items))
    names = {bool: "yes or no", int: "whole number", float: "number", str: "text", Path: "path"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
