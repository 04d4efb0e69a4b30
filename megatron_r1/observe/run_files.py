"""What a run folder says, read back: for the report, and for anything else that compares runs.

Left out: writing these files (metrics.py) and presenting them (report.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError
from megatron_r1.observe.metrics import read_json_lines

MAX_ROLLOUTS = 600
"""Completions put into the page, spread evenly over the file: 16 long ones a step would make gigabytes."""
MAX_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What a run folder holds: run.json, metrics.jsonl, summary.json (empty where missing) and sampled
    rollouts."""

    name: str
    run: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    rollouts: Sequence[Mapping[str, Any]]
    num_rollouts: int


def read_run(run_dir: Path) -> RunFiles:
    """Read a run folder. DataError if it has neither run.json nor metrics.jsonl, or if a file is damaged."""
    if not (run_dir / "run.json").exists() and not (run_dir / "metrics.jsonl").exists():
        raise DataError(f"{run_dir}: no run.json and no metrics.jsonl; expected the run_dir of a run")
    run = read_object(run_dir / "run.json")
    num_rollouts = sum(1 for _ in read_json_lines(run_dir / "rollouts.jsonl"))
    return RunFiles(
        name=str(run.get("name") or run_dir.resolve().name),
        run=run,
        metrics=list(read_json_lines(run_dir / "metrics.jsonl")),
        summary=read_object(run_dir / "summary.json"),
        rollouts=list(_sample(run_dir / "rollouts.jsonl", num_rollouts)),
        num_rollouts=num_rollouts,
    )


def _sample(path: Path, count: int) -> Iterator[dict[str, Any]]:
    """Every record, or MAX_ROLLOUTS of them spread evenly, each text cut to MAX_CHARACTERS."""
    kept = 0
    for index, record in enumerate(read_json_lines(path)):
        if index * MAX_ROLLOUTS < kept * count:
            continue
        kept += 1
        for key in ("prompt", "completion"):
            text = str(record.get(key, ""))
            cut = len(text) - MAX_CHARACTERS
            record[key] = text if cut <= 0 else f"{text[:MAX_CHARACTERS]}… [{cut:,} more characters]"
        yield record


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if it is missing, DataError if it is damaged."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: a JSON {type(content).__name__}; expected an object")
    return content
