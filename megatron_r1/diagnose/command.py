"""The command `megatron-r1 diagnose FOLDER`: as the process that starts the ranks, or as one of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from megatron_r1.cluster.task import become_rank
from megatron_r1.diagnose.config import DiagnoseConfig, validate_diagnose
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.folder import RENDEZVOUS
from megatron_r1.pipeline.launch import PARENT_VARIABLE, Ranks, launch_local
from megatron_r1.pipeline.worker import run_rank


def diagnose(words: Sequence[str]) -> int:
    """Exit status: 0 the two agree, 1 a module departs or the work failed. ConfigError before anything is started."""
    words = ["--folder", *words] if words and not words[0].startswith("-") else list(words)
    if PARENT_VARIABLE not in os.environ:
        become_rank()
    config = tyro.cli(DiagnoseConfig, args=words, prog="megatron-r1 diagnose")
    shape = validate_diagnose(config)
    if "RANK" in os.environ:
        if config.run_dir is None:
            raise ConfigError("run_dir is not given; ranks of torchrun or srun need a folder that all of them see")
        config.run_dir.mkdir(parents=True, exist_ok=True)
        return run_rank(config, shape, _on_rank)  # pyright: ignore[reportArgumentType] - run_dir is given
    processes = Ranks(
        world_size=config.parallel.world_size, threads=config.threads_per_rank, cpu=config.device == "cpu"
    )
    with tempfile.TemporaryDirectory(prefix="megatron-r1-diagnose-") as private:
        if config.run_dir is None:
            return launch_local(Path(private), [*words, "--run-dir", private], processes, command="diagnose")
        shutil.rmtree(config.run_dir / RENDEZVOUS, ignore_errors=True)  # of an earlier diagnosis
        config.run_dir.mkdir(parents=True, exist_ok=True)
        return launch_local(config.run_dir, words, processes, command="diagnose")


def _on_rank(*given: Any) -> None:
    from megatron_r1.diagnose.run import diagnose_on_rank

    diagnose_on_rank(*given)
