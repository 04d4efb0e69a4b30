"""What the numbers in metrics.jsonl and summary.json are: each kind of stage has a table of their names.

The tables stand beside what writes the numbers (stages/*/names.py); docs/metrics.md is printed from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

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
