"""The paths inside a configuration: what a stage reads, and where a pipeline puts other paths in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

WRITTEN = ("run_dir", "out")
"""Fields that name a folder which is written; every other Path is an input."""
RECORDED = "recorded"
"""Folder of a run's recorded rollouts, in its own."""
READ_WITHIN = {"train_only": RECORDED}
"""Fields that name a run's folder of which only a part is read."""


def input_paths(config: object) -> dict[str, Path]:
    """Every path that the configuration reads, by the field that names it (`data.files[0]`)."""
    found: dict[str, Path] = {}

    def walk(value: object, field: str) -> None:
        if isinstance(value, Path):
            found[field] = value
        elif isinstance(value, tuple):
            for number, item in enumerate(value):
                walk(item, f"{field}[{number}]")
        elif dataclasses.is_dataclass(value):
            for part in dataclasses.fields(value):
                if part.name not in WRITTEN:
                    walk(getattr(value, part.name), f"{field}.{part.name}" if field else part.name)

    walk(config, "")
    return found


def read_of(field: str, path: Path) -> Path:
    """What is read of the input path `path`, which `field` names. The rest may change: a run's report is drawn anew."""
    return path / READ_WITHIN[field] if field in READ_WITHIN else path


def replace_inputs(config: T, change: Callable[[Path], Path]) -> T:
    """The configuration with every input path changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, Path):
            return change(value)
        if isinstance(value, tuple):
            return tuple(changed(item) for item in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = {
                part.name: changed(getattr(value, part.name))
                for part in dataclasses.fields(value)
                if part.name not in WRITTEN and part.init
            }
            return dataclasses.replace(value, **parts)
        return value

    return changed(config)
