"""What a finished run wrote, held against the table of its kind's names."""

import json
from pathlib import Path

from megatron_r1.algorithms import algorithm_named
from megatron_r1.observe.names import unknown_names
from megatron_r1.pipeline.kinds import KINDS
from megatron_r1.stages.grpo.names import step_names


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
