"""Run one stage: as the process that starts the others, or as one of them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_r1.config.schema import StageConfig
from megatron_r1.pipeline.folder import prepare_folder
from megatron_r1.pipeline.kinds import check, loop_of, ranks_of
from megatron_r1.pipeline.launch import PARENT_VARIABLE, Ranks, launch_local


def run_stage(config: StageConfig, words: Sequence[str]) -> int:
    """Make the stage's folder and run `megatron-r1 run WORDS` as its processes. Returns the exit status."""
    prepared = prepare_folder(config)
    with prepared.lock:
        if prepared.moved is not None:
            print(f"the earlier run was moved to {prepared.moved}", flush=True)
        return launch_local(config.run_dir, words, ranks_of(config) or Ranks(world_size=1, threads=1, cpu=True))


def run_here(config: StageConfig) -> int:
    """Run the stage in this process, which is one of its ranks (RANK is set). Returns the exit status."""
    # The folder is made once: by the parent that started this rank, or by rank 0, which alone looks whether it may.
    outer = PARENT_VARIABLE not in os.environ
    shape = check(config, folder=os.environ["RANK"] == "0" and outer)
    if ranks_of(config) is None:
        from megatron_r1.pipeline.single import run_single

        if not outer:
            return run_single(config, loop_of(config))
        if os.environ["RANK"] != "0":  # one process does it all
            return 0
        with prepare_folder(config).lock:
            return run_single(config, loop_of(config))
    from megatron_r1.pipeline.worker import run_rank

    return run_rank(config, shape)  # pyright: ignore[reportArgumentType] - it has ranks, so a model
