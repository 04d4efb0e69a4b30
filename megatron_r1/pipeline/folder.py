"""A run's folder: what lies where, and what happens to an older run of the same name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_r1.config.schema import RunConfig
from megatron_r1.observe.metrics import plain_json, write_json


def prepare_folder(config: RunConfig) -> Path | None:
    """Make run_dir and write run.json. An older run is renamed to run_dir.1, .2, ... (if_exists="archive"; validation
    has refused otherwise). Returns where it went, or None."""
    moved = None
    folder = config.run_dir
    if folder.is_dir() and any(folder.iterdir()):
        number = 1
        while (moved := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(moved)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", {"name": config.name, "config": config_as_json(config)})
    return moved


def config_as_json(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain JSON."""
    return plain_json(dataclasses.asdict(config))
