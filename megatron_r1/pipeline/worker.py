"""One trainer rank of a run, from process start to exit."""

from __future__ import annotations

import os
import sys

from megatron_r1.config.schema import RunConfig
from megatron_r1.config.shape import load_shape
from megatron_r1.errors import CheckpointError, ConfigError, DataError, EngineError, MismatchError


def run_rank(config: RunConfig) -> int:
    """Join the other ranks and run. Expected errors are printed once, by rank 0, without a traceback."""
    from megatron_r1.policy.platform import configure_process

    cpu = config.rollout.device == "cpu"
    configure_process(threads=config.train.threads_per_rank, cpu=cpu)
    import torch

    from megatron_r1.pipeline.zero import run_zero
    from megatron_r1.policy import topology

    # Made by pipeline.launch; under an outer torchrun there is none, and its own store is the rendezvous.
    private = config.run_dir / ".rendezvous"
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "run")
    topology.initialise(
        config.parallel,
        seed=config.seed,
        cpu=cpu,
        timeout_seconds=2 * config.rollout.request_timeout_seconds,
        store_path=str((private / run_id).resolve()) if private.is_dir() else None,
    )
    device = torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
    try:
        run_zero(config, load_shape(config.model.path), device)
    except (CheckpointError, ConfigError, DataError, EngineError, MismatchError, FileExistsError) as error:
        if topology.rank() == 0:
            print(f"megatron-r1: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        topology.finalise()
    return 0
