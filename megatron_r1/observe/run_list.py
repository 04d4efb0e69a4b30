"""Every run below a folder, as far as its files can be read: for the page that compares them.

A folder that is broken or half-written is in the list, with what is wrong with it; nothing here raises for one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.run_folder import LOCK, is_held
from megatron_r1.observe.metrics import read_json_lines
from megatron_r1.observe.pipeline_report import result_in_words
from megatron_r1.observe.run_files import read_object

ENDS = ("summary.json", "results.json")
"""A run has one of these when it is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedRun:
    """`name` is its folder, seen from the folder that was searched; `fault` says why it could not be read, and its
    other fields are then what could be."""

    name: str
    folder: Path
    stage: str = "–"
    model: str = ""
    state: str
    metrics: Sequence[Mapping[str, Any]] = ()
    result: str = "–"
    changed: float = 0.0
    """Seconds since 1970 of the last change of its metrics, or of the folder."""
    fault: str = ""


def runs_below(root: Path) -> list[ListedRun]:
    """Those that changed last come first, those that cannot be read last."""
    found = [listed(folder, root) for folder in run_folders(root)]
    return sorted(found, key=lambda run: (bool(run.fault), -run.changed, run.name))


def run_folders(root: Path) -> Iterator[Path]:
    """Folders below `root`, itself included, that a run has begun to write. What lies in one is the run's own."""
    for place, folders, files in os.walk(root):
        if (
            "run.json" in files
            or "metrics.jsonl" in files
            or (LOCK in files and not folders and "manifest.json" not in files)
        ):
            folders.clear()
            yield Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def listed(folder: Path, root: Path) -> ListedRun:
    name = folder.relative_to(root).as_posix()
    name = folder.resolve().name if name == "." else name
    changed = _changed(folder)
    try:
        state = _state(folder)
        run = read_object(folder / "run.json")
        config = run.get("config") or {}
        summary = read_object(folder / "summary.json") or read_object(folder / "results.json")
        metrics = list(read_json_lines(folder / "metrics.jsonl"))
        for number, row in enumerate(metrics, start=1):
            if not isinstance(row, dict) or not is_number(row.get("step")):
                raise ValueError(f"{folder / 'metrics.jsonl'}, line {number}: not a row with a step")
        return ListedRun(
            name=name,
            folder=folder,
            stage=stage_of(run),
            model=_model_of(config),
            state=state,
            metrics=metrics,
            result=result_in_words(summary),
            changed=changed,
            fault="" if run else "no run.json: it was not begun, or not whole",
        )
    except Exception as error:  # anybody's files: whatever is wrong with them, the others are shown
        fault = str(error) or type(error).__name__
        return ListedRun(name=name, folder=folder, state="cannot be read", changed=changed, fault=fault)


def stage_of(run: Mapping[str, Any]) -> str:
    """The kind of stage, and the algorithm where it is not the usual one."""
    kind = str(run.get("kind") or "–")
    algorithm = ((run.get("config") or {}).get("algorithm") or {}).get("name", "grpo")
    return kind if algorithm == "grpo" else f"{kind}, {algorithm}"


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _state(folder: Path) -> str:
    if is_held(folder):
        return "running"
    return "done" if any((folder / name).exists() for name in ENDS) else "stopped"


def _model_of(config: Mapping[str, Any]) -> str:
    model = config.get("model")
    path = model.get("path") if isinstance(model, Mapping) else model
    return Path(str(path)).name if path else ""


def _changed(folder: Path) -> float:
    for path in (folder / "metrics.jsonl", folder / "run.json", folder):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0
