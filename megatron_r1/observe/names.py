"""What the numbers in metrics.jsonl and summary.json are: each kind of stage has a table of their names.

The tables stand beside what writes the numbers (stages/*/names.py); docs/metrics.md is printed from them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

PART = "PART"
"""In a table: the name of any part of the reward (accuracy, format, language, a reward model's or a function's)."""
NUMBER = "K"
"""In a table, after `@`: any whole number."""


class Number(NamedTuple):
    """One name's `unit` and `meaning`."""

    unit: str
    meaning: str


Names = Mapping[str, Number]
"""By name; a name within another one has the outer one before it, as trackers get it: seconds/rollout."""

STEP: Names = {"step": Number("count", "The step's number, from 0.")}
OPTIMIZER: Names = {
    "grad_norm": Number("norm", "Norm of the whole gradient before it is clipped."),
    "lr": Number("rate", "Learning rate of the step."),
}
SECONDS_TOTAL: Names = {"seconds_total": Number("seconds", "From the stage's start to its end.")}


def names_in(row: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """The names of a row by their paths."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from names_in(value, f"{within}{key}/")
        else:
            yield f"{within}{key}"


def unknown_names(row: Mapping[str, Any], table: Names, parts: Collection[str] = ()) -> list[str]:
    """The names in a row of metrics.jsonl, or in a summary, that its table does not have. `parts`: names of parts of
    the reward that PART stands for."""
    return [name for name in names_in(row) if name not in table and _general(name, parts) not in table]


def _general(name: str, parts: Collection[str]) -> str:
    """The entry of a table that stands for names like this one."""
    outer, slash, last = name.rpartition("/")
    kind, at, number = last.partition("@")
    if at and number.isdigit():
        return f"{outer}{slash}{kind}@{NUMBER}"
    return f"{outer}{slash}{PART}" if last in parts else name
