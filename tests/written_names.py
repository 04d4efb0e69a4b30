"""What a finished run wrote, held against the table of its kind's names."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_r1.algorithms import Algorithm, algorithm_named
from megatron_r1.observe.names import NUMBER, PART, Names, Number
from megatron_r1.pipeline.kinds import KINDS
from megatron_r1.stages.grpo.names import STEP_NAMES


def undocumented(folder: Path, kind: str, *, parts=(), algorithm: str = "grpo") -> set[str]:
    """Names in metrics.jsonl and summary.json of a run that docs/metrics.md does not have. `kind`: a stage's folder."""
    stage = next(one for one in KINDS if one.config.__module__.split(".")[-2] == kind)
    table = step_names(type(algorithm_named(algorithm))) if kind == "grpo" else stage.metrics
    steps = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in steps.read_text().splitlines()] if steps.exists() else []
    summary = json.loads((folder / "summary.json").read_text())
    assert summary and bool(rows) == bool(table)
    return {name for row in rows for name in unknown_names(row, table, parts)} | set(
        unknown_names(summary, stage.summary, parts)
    )


def step_names(algorithm: type[Algorithm]) -> Names:
    """The names of a step's row, those of the algorithm's own metrics among them."""
    return {**STEP_NAMES, **{name: Number("", meaning) for name, meaning in algorithm.METRICS.items()}}


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


def names_in(row: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """The names of a row by their paths."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from names_in(value, f"{within}{key}/")
        else:
            yield f"{within}{key}"
