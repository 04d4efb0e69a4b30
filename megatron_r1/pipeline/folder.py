"""A run's folder: what lies where, who may write there, and what happens to an older run of the same name."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_r1.config.folder_files import files_of
from megatron_r1.config.paths import input_paths, read_of
from megatron_r1.config.run_folder import LOCK, STOP, is_held
from megatron_r1.config.same import as_json, same_computation
from megatron_r1.config.schema import StageConfig
from megatron_r1.config.user_code import code_files
from megatron_r1.errors import ConfigError
from megatron_r1.observe.metrics import plain_json, write_json
from megatron_r1.observe.watch import STACKS
from megatron_r1.pipeline.kinds import kind_of, name_of_kind

RENDEZVOUS = ".rendezvous"
"""Where the ranks of a local launch meet; mode 0700."""


@dataclass(frozen=True, slots=True)
class PreparedFolder:
    """`lock` keeps the folder this process's: hold it until the run has ended. `moved`: where an older run went."""

    lock: IO[str]
    moved: Path | None


def prepare_folder(config: StageConfig) -> PreparedFolder:
    """Make run_dir, lock it and write run.json. An older run is renamed to run_dir.1, .2, ... (validation has refused
    where it may not be, and what is no run's folder or is in use), or kept if if_exists="resume" and it is an
    unfinished run of this configuration.

    Raises ConfigError if another run has taken the folder meanwhile."""
    moved = None
    folder = config.run_dir
    if folder.is_dir() and any(folder.iterdir()):
        if is_held(folder):
            raise ConfigError(f"run_dir: another run has just started in {folder}; choose another --run-dir")
        if config.if_exists == "resume" and _can_go_on(config):
            shutil.rmtree(folder / RENDEZVOUS, ignore_errors=True)
            shutil.rmtree(folder / STACKS, ignore_errors=True)
            (folder / STOP).unlink(missing_ok=True)  # asked of the run before
        else:
            moved = _free_name(folder)
            folder.rename(moved)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / LOCK, "a", encoding="utf-8")  # noqa: SIM115 - held for as long as the run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConfigError(f"run_dir: another run has just started in {folder}; choose another --run-dir") from error
    lock.write(f"{os.getpid()}@{socket.gethostname()}\n")
    lock.flush()
    kind = name_of_kind(kind_of(config))
    write_json(
        folder / "run.json",
        {"name": config.name, "kind": kind, "config": config_as_json(config), "inputs": _inputs(config)},
    )
    return PreparedFolder(lock, moved)


def _free_name(folder: Path) -> Path:
    number = 1
    while (moved := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return moved


def _can_go_on(config: StageConfig) -> bool:
    """Whether run_dir holds an unfinished run that computes the same from the same inputs."""
    return not (config.run_dir / "summary.json").exists() and _is_same_run(config)


def is_finished(config: StageConfig) -> bool:
    """Whether run_dir holds the end of this very run: one that is started again to go on has nothing to do."""
    return config.if_exists == "resume" and (config.run_dir / "summary.json").exists() and _is_same_run(config)


def _is_same_run(config: StageConfig) -> bool:
    try:
        known = json.loads((config.run_dir / "run.json").read_text(encoding="utf-8"))
        same = same_computation(known["config"], config) and known["inputs"] == _inputs(config)
        if getattr(getattr(config, "model", None), "router_bias_update_rate", 0):
            # Padding counts in the routers' loads, and differs between layouts.
            same = same and known["config"]["parallel"] == config_as_json(config)["parallel"]
        return same
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _inputs(config: StageConfig) -> dict[str, list[list[Any]]]:
    """Name, size and time of change (ns) of every file that each input path has: enough to see that one was replaced
    between two starts, without reading it."""
    found = {}
    for field, named in {**input_paths(config), **code_files(config)}.items():
        path = read_of(field, named)
        stats = [(file, file.stat()) for file in files_of(path)]
        found[field] = [[str(file.relative_to(path)), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    return found


def config_as_json(config: StageConfig) -> dict[str, Any]:
    """The resolved configuration as plain JSON."""
    return plain_json(as_json(config))
