"""One trainer rank of a run, from process start to exit."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_r1.cluster.task import store_path
from megatron_r1.config.schema import TrainerStage
from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import PREEMPTED, PreemptedError, UserError
from megatron_r1.pipeline.folder import RENDEZVOUS, prepare_folder
from megatron_r1.pipeline.launch import obey_launcher
from megatron_r1.stages.common.preempt import listen

Loop = Callable[..., Any]
"""What a rank runs: (config, shape, device)."""

LOST_PEER = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Socket Timeout|remote process exited", re.I)
"""How gloo and nccl say that another rank has ended."""


def run_rank(config: TrainerStage, shape: ModelShape, loop: Loop | None = None) -> int:
    """Join the other ranks and run `loop`, or (None) the stage's own in the stage's folder. Errors that the user can
    mend are printed once, without a traceback."""
    private = config.run_dir / RENDEZVOUS if obey_launcher() else None
    listen()
    from megatron_r1.policy.platform import configure_process

    cpu = config.device == "cpu"
    try:
        configure_process(threads=config.train.threads_per_rank, cpu=cpu, deterministic=config.train.deterministic)
    except UserError as error:
        _say_once(f"megatron-r1: {error}", private)
        return 1
    import torch

    from megatron_r1.agreement import on_rank_zero
    from megatron_r1.pipeline.kinds import loop_of
    from megatron_r1.policy import topology

    lock = None
    try:
        topology.initialise(
            config.parallel,
            seed=config.seed,
            cpu=cpu,
            timeout_seconds=config.train.collective_timeout_seconds,
            store_path=str((private / "store").resolve()) if private else (store_path() if cpu else None),
        )
        device = torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
        if (
            loop is None and private is None
        ):  # an outer launcher (torchrun, srun): no parent of ours has made the folder
            held = []
            on_rank_zero(lambda: held.append(prepare_folder(config)))
            lock = held[0].lock if held else None
        (loop or loop_of(config))(config, shape, device)
    except PreemptedError as stop:
        _say_once(f"megatron-r1: {stop}", private)
        return PREEMPTED
    except (UserError, OSError) as error:
        _say_once(f"megatron-r1: {error}", private)
        return 1
    except RuntimeError as error:
        if not LOST_PEER.search(str(error)):
            raise
        _say_once("megatron-r1: a rank lost its connection to another one, which has ended: see its message", private)
        return 1
    finally:
        topology.finalise()
        if lock is not None:
            lock.close()
    return 0


def _say_once(text: str, private: Path | None) -> None:
    """Print `text` unless another rank of this launch has said the same; under an outer launcher, name the rank."""
    rank = os.environ.get("RANK", "0")
    if private is None:
        print(text if rank == "0" else f"rank {rank}: {text}", file=sys.stderr, flush=True)
        return
    try:
        (private / hashlib.sha256(text.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return
    except OSError:
        pass  # a full disk may be the very error
    print(text, file=sys.stderr, flush=True)
