"""A stage's servers, and the GPUs that each sees. Rank 0 starts them on its own host, or attaches to those that
the job's other nodes supervise (serve.py)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_r1.cluster.task import own_address, this_task
from megatron_r1.config.schema import RolloutConfig
from megatron_r1.engines.base import Engine, EngineSpec, start_all
from megatron_r1.engines.chosen import engine_kind
from megatron_r1.errors import ConfigError


def own_devices(rollout: RolloutConfig, *, after: int = 0) -> Sequence[str | None]:
    """CUDA_VISIBLE_DEVICES of each server on this host, beginning `after` so many of the GPUs that this process sees;
    None where there is nothing to choose (CPUs, servers on other nodes)."""
    task = this_task()
    if rollout.device == "cpu" or (task is not None and task.has_servers):
        return (None,) * rollout.num_engines
    return rollout.devices or share_gpus(visible_gpus(), rollout, after)


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, by the names that CUDA_VISIBLE_DEVICES has for them: numbers, UUIDs or MIG
    instances. A child that was given a number instead would take that one of the machine's."""
    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = list(map(str, range(count))) if given is None else [name.strip() for name in given.split(",")]
    return names[:count]


def share_gpus(gpus: Sequence[str], rollout: RolloutConfig, first: int) -> list[str]:
    """rollout.tensor_parallel GPUs for each server, in order from `first` on."""
    size = rollout.tensor_parallel
    needed = first + rollout.num_engines * size
    if len(gpus) < needed:
        before = f"{first} of the trainer and " if first else ""
        raise ConfigError(
            f"rollout.num_engines is {rollout.num_engines} with tensor_parallel {size}; {before}{needed - first} of "
            f"the servers make {needed} GPUs, and this process sees {len(gpus)} ({', '.join(gpus) or 'none'}): ask the "
            "job for more, use fewer servers or rollout.sync ipc, or name them in rollout.devices"
        )
    starts = [first + index * size for index in range(rollout.num_engines)]
    return [",".join(gpus[start : start + size]) for start in starts]


def start_rollouts(
    rollout: RolloutConfig, *, model_path: Path, run_dir: Path, seed: int, visible_devices: Sequence[str | None]
) -> tuple[Engine, ...]:
    """rollout.num_engines servers of `model_path`, ready: processes of ours, or those of the job's server nodes."""
    first = EngineSpec(config=rollout, model_path=model_path, run_dir=run_dir)
    specs = [
        dataclasses.replace(first, index=index, seed=seed + index, visible_devices=devices)
        for index, devices in zip(range(rollout.num_engines), visible_devices, strict=True)
    ]
    return start_all([make_engine(spec) for spec in specs])


def make_engine(spec: EngineSpec) -> Engine:
    """A server, not started: of the job's server nodes, or this process's where there are none (it alone has
    `visible_devices`: the others' places say which GPUs they see)."""
    kind, task = engine_kind(spec.config), this_task()
    if task is None or not task.has_servers:
        return kind.local(spec)
    return kind.attached(dataclasses.replace(spec, host=own_address()), attempt=task.attempt)
