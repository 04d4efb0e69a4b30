"""A file's values laid over a configuration: the same tree of fields, from JSON or TOML instead of the command line.

Values must have the fields' types as JSON has them: a number is not written as text, a list stays a list. Bounds and
the rules of parts are checked later, with those of the command line. Which file, and over what: config_file.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_r1.algorithms import Algorithm, algorithm_named
from megatron_r1.config.describe import Field, defaults_of, fields_of, hints_of, leaves_of, type_text
from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.renamed import REMEDIES
from megatron_r1.errors import ConfigError
from megatron_r1.plugins import told


def overlaid(kind: type, given: Any, values: Mapping[str, Any], *, missing: Any) -> Any:
    """An object of the dataclass `kind` with `values` over those of `given` (None: over the class's own defaults).
    `missing` stands where a field has neither. Raises ConfigError with every fault, by the fields' paths."""
    work = _Overlay(kind, given, missing)
    made = work.part(kind, given, values, ())
    if work.faults:
        raise ConfigError(work.faults)
    return made


class _Overlay:
    """One walk over the values. `faults` collects; what has one is None."""

    def __init__(self, kind: type, given: Any, missing: Any) -> None:
        self.kind, self.given, self.missing = kind, given, missing
        self.faults: list[str] = []

    def part(self, kind: type, given: Any, values: Mapping[str, Any], within: tuple[str, ...]) -> Any:
        named = {name.replace("-", "_"): value for name, value in values.items()}
        twice = [name for name in values if "-" in name and name.replace("-", "_") in values]
        self.faults += [f"{_text((*within, name))} stands twice, with - and with _; leave one out" for name in twice]
        fields = {field.path[-1]: field for field in fields_of(kind, given)}
        self.faults += [self._unknown((*within, name), list(fields)) for name in named if name not in fields]
        hints, defaults = hints_of(kind), defaults_of(kind)
        made: dict[str, Any] = {}
        for name, field in fields.items():
            old = getattr(given, name) if given is not None else defaults[name]
            path = (*within, name)
            if name in named:
                made[name] = self._value(field, hints.get(name, Any), old, named[name], path)
            elif old is dataclasses.MISSING and "[]" in within[-1:]:
                self.faults.append(f"{_text(path)} is missing; it has no default")
            else:
                made[name] = self.missing if old is dataclasses.MISSING else old
        if self.faults:
            return None
        try:
            return kind(**made)
        except ConfigError as error:
            self.faults += error.faults
        except Exception as error:  # a user's class refuses what it is given
            self.faults.append(f"{_text(within)}{told(error)}")
        return None

    def _value(self, field: Field, hint: Any, old: Any, value: Any, path: tuple[str, ...]) -> Any:
        kind = field.part
        if kind is not None and issubclass(kind, Algorithm):
            return self._algorithm(old, value, path)
        if kind is not None and not (value is None and type(None) in typing.get_args(hint)):
            if isinstance(value, Mapping):
                return self.part(kind, old if type(old) is kind else None, value, path)
            return self._fault(path, value, f"a table of fields: {_some(kind)}")
        if field.items is not None:
            if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
                paths = [(*path, str(number), "[]") for number in range(len(value))]
                return tuple(self.part(field.items, None, *item) for item in zip(value, paths, strict=True))
            return self._fault(path, value, f"a list of tables with {_some(field.items)}")
        return self._leaf(hint, value, path)

    def _algorithm(self, old: Any, value: Any, path: tuple[str, ...]) -> Any:
        """By its name, which brings its defaults, or a table with fields; without a name those of the recipe's."""
        table = {"name": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping) or not isinstance(table.get("name", ""), str):
            return self._fault(path, value, 'a name, such as "dapo", or a table with name')
        if "name" in table:
            try:
                old = algorithm_named(table["name"], _text(path))
            except ConfigError as error:
                self.faults += error.faults
                return None
        return self.part(type(old), old, {name: table[name] for name in table if name != "name"}, path)

    def _leaf(self, hint: Any, value: Any, path: tuple[str, ...]) -> Any:
        from pydantic import ValidationError

        try:
            return _reader(hint).validate_json(json.dumps(value), strict=True)
        except (ValidationError, TypeError, ValueError):
            return self._fault(path, value, type_text(hint))

    def _fault(self, path: tuple[str, ...], value: Any, law: str) -> None:
        self.faults.append(f"{_text(path)} is {_shown(value)}; it must be: {law}")

    def _unknown(self, path: tuple[str, ...], known: Sequence[str]) -> str:
        text = _text(path)
        for old, remedy in REMEDIES.items():
            if text == old or text.endswith(f".{old}"):
                return f"{text}: {remedy}"
        where = "at the top" if len(path) == 1 else f"in {_text(path[:-1])}"
        near = difflib.get_close_matches(path[-1], known, n=3) or self._elsewhere(path)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"docs/configuration.md has all; {', '.join(known)}"
        return f"{text}: there is no such field {where}; {remedy}"

    def _elsewhere(self, path: tuple[str, ...]) -> list[str]:
        """Fields of that name, or one like it, in other parts of the same stage."""
        leaves = [field.path for field in leaves_of(self.kind, self.given)]
        if issubclass(self.kind, PipelineConfig) and path[1:]:
            leaves = [leaf for leaf in leaves if leaf[0] == path[0]]
        names = difflib.get_close_matches(path[-1], {leaf[-1] for leaf in leaves}, n=2, cutoff=0.75)
        return [_text(leaf) for leaf in leaves if leaf[-1] in names][:3]


@functools.cache
def _reader(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def _text(path: tuple[str, ...]) -> str:
    return ".".join(part for part in path if part != "[]")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _some(kind: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(kind))[:80]
