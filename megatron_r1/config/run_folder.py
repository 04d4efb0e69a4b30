"""Whether a run may have the folder that its configuration names. Nothing is changed here (pipeline/folder.py does)."""

from __future__ import annotations

import fcntl
from pathlib import Path

from megatron_r1.config.paths import input_paths
from megatron_r1.config.schema import StageConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import ConfigError

LOCK = ".lock"
"""Locked (flock) by the process that runs in the folder; holds its process id."""
STOP = "stop"
"""A file that asks the run to end after its step (stages/common/preempt.py)."""


def folder_faults(config: StageConfig) -> list[str]:
    """What forbids config.run_dir: a file, not a run's folder, in use, or around the run's own inputs."""
    folder, given = config.run_dir.resolve(), config.run_dir
    if folder.exists() and not folder.is_dir():
        return [f"run_dir: {given} is a file"]
    if not folder.is_dir() or not any(folder.iterdir()):
        return []
    if folder == Path.cwd() or folder in Path.cwd().parents:
        return [f"run_dir: {given} is the folder that you are in, or above it; choose one below, such as runs/mine"]
    if config.if_exists == "refuse":
        return [f"run_dir: {given} is not empty; choose another --run-dir, or --if-exists archive to move it aside"]
    # A run that was killed as it began has left its lock alone.
    if not (folder / "run.json").is_file() and any(entry.name != LOCK for entry in folder.iterdir()):
        return [f"run_dir: {given} is not empty and not a run's folder (no run.json); choose another --run-dir"]
    if is_held(folder):
        return [
            f"run_dir: a run is going on in {given} (process {_holder(folder)}); choose another --run-dir, or, if that "
            f"process is gone with its node and the lock is stale, remove {given / LOCK}"
        ]
    return [
        f"{name}: {path} lies in run_dir {given}, which would be moved aside; choose another --run-dir"
        for name, path in input_paths(config).items()
        if folder == path.resolve() or folder in path.resolve().parents
    ]


def sound(config: StageConfig, shape: ModelShape | None, faults: list[str], *, folder: bool) -> ModelShape:
    """`shape`, if nothing is at fault. ConfigError lists `faults` otherwise, and those of run_dir where `folder`."""
    if folder:
        faults = faults + folder_faults(config)
    if faults or shape is None:
        raise ConfigError(faults)
    return shape


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder's lock."""
    try:
        with open(folder / LOCK, encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _holder(folder: Path) -> str:
    return ((folder / LOCK).read_text(encoding="utf-8").split() or ["unknown"])[-1]
