"""A run's folder: what lies where, who may write there, and what happens to an older run of the same name."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_r1.config.run_folder import LOCK, is_held
from megatron_r1.config.schema import StageConfig
from megatron_r1.errors import ConfigError
from megatron_r1.observe.metrics import plain_json, write_json

RENDEZVOUS = ".rendezvous"
"""Where the ranks of a local launch meet; mode 0700."""


@dataclass(frozen=True, slots=True)
class PreparedFolder:
    """`lock` keeps the folder this process's: hold it until the run has ended. `moved`: where an older run went."""

    lock: IO[str]
    moved: Path | None


def prepare_folder(config: StageConfig) -> PreparedFolder:
    """Make run_dir, lock it and write run.json. An older run is renamed to run_dir.1, .2, ... (if_exists="archive";
    validation has refused otherwise, and what is no run's folder or is in use).

    Raises ConfigError if another run has taken the folder meanwhile."""
    moved = None
    folder = config.run_dir
    if folder.is_dir() and any(folder.iterdir()):
        if is_held(folder):
            raise ConfigError(f"run_dir: another run has just started in {folder}; choose another --run-dir")
        number = 1
        while (moved := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(moved)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / LOCK, "a", encoding="utf-8")  # noqa: SIM115 - held for as long as the run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConfigError(f"run_dir: another run has just started in {folder}; choose another --run-dir") from error
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    write_json(folder / "run.json", {"name": config.name, "config": config_as_json(config)})
    return PreparedFolder(lock, moved)


def config_as_json(config: StageConfig) -> dict[str, Any]:
    """The resolved configuration as plain JSON."""
    return plain_json(dataclasses.asdict(config))
